//! Sizes of volumes that clients here were told.
//!
//! A volume's group may have taken a new size before this node hears of it from the cluster group. A
//! client that is told so takes it for the volume's size on all of its connections to this node: so
//! must their sessions. Never decides anything: whether a write is inside the volume its group says.

use std::cell::RefCell;
use std::collections::BTreeMap;

use ballast_block::FamilyId;

/// What was told that this node does not know otherwise: hardly ever anything.
#[derive(Default)]
pub(crate) struct SizesTold(RefCell<BTreeMap<FamilyId, u64>>);

impl SizesTold {
    /// A client is told a size, in bytes. `known` are those that the node has from the cluster group;
    /// what those have caught up with, or a volume that is gone, is forgotten.
    pub(crate) fn tell(
        &self,
        family: FamilyId,
        size: u64,
        known: impl Fn(FamilyId) -> Option<u64>,
    ) {
        let mut told = self.0.borrow_mut();
        let is_news = |family, size| known(family).is_some_and(|known| known < size);
        told.retain(|&family, size| is_news(family, *size));
        if is_news(family, size) {
            let largest = told.entry(family).or_insert(size);
            *largest = size.max(*largest);
        }
    }

    /// The largest that was told of a volume, 0 where nothing is to be remembered.
    pub(crate) fn of(&self, family: FamilyId) -> u64 {
        self.0.borrow().get(&family).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_told_counts_until_it_is_known() {
        let (grown, other) = (FamilyId(1), FamilyId(2));
        let told = SizesTold::default();
        let known = |family| (family == grown).then_some(10);
        told.tell(grown, 10, known);
        assert_eq!(told.of(grown), 0, "that is known");
        told.tell(grown, 30, known);
        told.tell(grown, 20, known);
        assert_eq!((told.of(grown), told.of(other)), (30, 0));
        told.tell(other, 50, known);
        assert_eq!((told.of(grown), told.of(other)), (30, 0), "there is no such volume");
        told.tell(grown, 20, |_| Some(30));
        assert_eq!(told.of(grown), 0, "caught up");
        assert!(told.0.borrow().is_empty());
    }
}
