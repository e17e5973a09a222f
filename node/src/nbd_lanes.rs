//! Connections of one NBD client that share an attachment: lanes of a session.
//!
//! Owns which sessions there are on this shard, who is in them, and when one has ended. Once it has,
//! nothing of it is run any more, whatever still arrives on its lanes, and nobody can join it: a
//! request that the client asks again is run by a later attachment only, whose generation fences
//! everything of this one. docs/nbd.md has the argument. Never touches a socket.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ballast_block::{Epoch, FamilyId};
use ballast_env::Env;
use ballast_nbd::{HandleOrders, SessionLane};
use tokio::sync::{OnceCell, watch};

use crate::client::{AttachError, VolumeClient};
use crate::node::Inner;

/// Names a session: its volume, the lease that it is under (0 = none), the client's number.
pub(crate) type SessionKey = (FamilyId, Epoch, u64);

/// The sessions that can be joined.
pub(crate) type Sessions<E> = RefCell<BTreeMap<SessionKey, Rc<LaneSession<E>>>>;

/// What the lanes of a session have in common.
pub(crate) struct LaneSession<E: Env> {
    key: SessionKey,
    client: OnceCell<Rc<VolumeClient<E>>>,
    /// Every lane that ever joined: a number that comes twice is a new connection of a client whose
    /// old one may still hold requests.
    joined: RefCell<BTreeSet<u16>>,
    present: Cell<usize>,
    orders: Cell<HandleOrders>,
    ended: watch::Sender<bool>,
}

/// One lane's place in its session. Dropped before it departs, it ends the session.
pub(crate) struct Place<E: Env> {
    inner: Rc<Inner<E>>,
    session: Rc<LaneSession<E>>,
    lane: u16,
    left: bool,
}

/// Joins a session, or makes it. One of that name whose lane of this number is taken, or was, ends:
/// the client has begun anew.
pub(crate) fn join<E: Env>(
    inner: &Rc<Inner<E>>,
    (family, epoch): (FamilyId, Epoch),
    SessionLane { session, lane }: SessionLane,
) -> Place<E> {
    let key = (family, epoch, session);
    let known = inner.nbd_sessions.borrow().get(&key).cloned();
    let session = match known {
        Some(known) if !known.joined.borrow().contains(&lane) => known,
        known => {
            if let Some(known) = known {
                known.end(inner);
            }
            let made = Rc::new(LaneSession {
                key,
                client: OnceCell::new(),
                joined: RefCell::default(),
                present: Cell::new(0),
                orders: Cell::default(),
                ended: watch::Sender::new(false),
            });
            inner.nbd_sessions.borrow_mut().insert(key, made.clone());
            made
        }
    };
    session.joined.borrow_mut().insert(lane);
    session.present.set(session.present.get() + 1);
    Place { inner: inner.clone(), session, lane, left: false }
}

impl<E: Env> LaneSession<E> {
    fn end(&self, inner: &Inner<E>) {
        if self.ended.send_replace(true) {
            return;
        }
        inner.nbd_sessions.borrow_mut().remove(&self.key);
        if let Some(client) = self.client.get() {
            client.let_go();
        }
    }
}

impl<E: Env> Place<E> {
    /// The attachment, made by `open` if no lane has made it yet; none when the session has ended
    /// meanwhile.
    ///
    /// # Errors
    /// Those of `open`. Another lane that waits tries again.
    pub(crate) async fn attached<F>(
        &self,
        open: impl FnOnce() -> F,
    ) -> Result<Option<Rc<VolumeClient<E>>>, AttachError>
    where
        F: Future<Output = Result<VolumeClient<E>, AttachError>>,
    {
        let client = self.session.client.get_or_try_init(|| async { open().await.map(Rc::new) });
        let client = client.await?;
        if self.has_ended() {
            client.let_go();
            return Ok(None);
        }
        Ok(Some(client.clone()))
    }

    /// Whether a request that came on this lane may be run. One that was on another lane before ends
    /// the session.
    pub(crate) fn may_run(&self, handle: u64) -> bool {
        let mut orders = self.session.orders.get();
        let belongs = orders.belongs(self.lane, handle);
        self.session.orders.set(orders);
        if !belongs && !self.has_ended() {
            let (session, lane) = (format!("{:016x}", self.session.key.2), self.lane);
            tracing::info!(session, lane, handle, "a request moved to another connection");
            self.end();
        }
        !self.has_ended()
    }

    /// From now on nothing of the session is run, and every lane closes its connection.
    pub(crate) fn end(&self) {
        self.session.end(&self.inner);
    }

    fn has_ended(&self) -> bool {
        *self.session.ended.borrow()
    }

    /// Completes when the session has ended.
    pub(crate) fn ended(&self) -> impl Future<Output = ()> + use<E> {
        let mut ended = self.session.ended.subscribe();
        async move {
            // Its session outlives it, as the place does.
            let _ = ended.wait_for(|&ended| ended).await;
        }
    }

    /// The lane's connection is closed and nothing of it is in flight any more. What the last lane of
    /// a session leaves behind is the attachment, to be given up.
    pub(crate) fn depart(mut self, said_good_bye: bool) -> Option<Rc<VolumeClient<E>>> {
        self.left = said_good_bye;
        let is_last = self.session.present.get() == 1;
        self.session.client.get().filter(|_| is_last).cloned()
    }
}

impl<E: Env> Drop for Place<E> {
    fn drop(&mut self) {
        self.session.present.set(self.session.present.get() - 1);
        if !self.left || self.session.present.get() == 0 {
            self.end();
        }
    }
}
