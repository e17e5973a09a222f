//! Capacity ranges: from what was asked for to a size that a volume can have.

use ballast_block::BLOCK_SIZE;
use ballast_block::limits::{VOLUME_BYTES_MAX, VOLUME_BYTES_MIN};

use crate::error::Refusal;
use crate::v1::CapacityRange;

/// The size of a volume for which none was asked: what Kubernetes users put into examples.
pub const DEFAULT_BYTES: u64 = 1 << 30;

/// A checked range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// At least this: whole blocks. `None` = whatever the driver likes.
    pub required: Option<u64>,
    /// At most this.
    pub limit: Option<u64>,
}

impl Wanted {
    /// Checks a range.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for negative numbers or a limit under what is required, OUT_OF_RANGE when no
    /// volume can be of such a size.
    pub fn parse(range: Option<&CapacityRange>) -> Result<Wanted, Refusal> {
        let Some(range) = range else { return Ok(Wanted { required: None, limit: None }) };
        let bytes = |number: i64| {
            u64::try_from(number).map_err(|_| {
                Refusal::CapacityInvalid(format!("a capacity of {number} bytes is not valid"))
            })
        };
        let (required, limit) = (bytes(range.required_bytes)?, bytes(range.limit_bytes)?);
        if limit != 0 && required > limit {
            return Err(Refusal::CapacityInvalid(format!(
                "required_bytes {required} are more than limit_bytes {limit}"
            )));
        }
        let wanted = Wanted {
            required: (required != 0).then_some(required),
            limit: (limit != 0).then_some(limit),
        };
        wanted.size().map(|_| wanted)
    }

    /// The size of a new volume: the smallest that will do.
    ///
    /// # Errors
    /// OUT_OF_RANGE when no whole number of blocks lies in the range, or no volume is that large or
    /// small.
    pub fn size(&self) -> Result<u64, Refusal> {
        let limit = self.limit.unwrap_or(VOLUME_BYTES_MAX);
        let required = self.required.unwrap_or_else(|| DEFAULT_BYTES.min(limit));
        let block = BLOCK_SIZE as u64;
        if required > VOLUME_BYTES_MAX {
            return Err(Refusal::CapacityOutOfRange(format!(
                "no volume has {required} bytes: the largest has {VOLUME_BYTES_MAX}"
            )));
        }
        let size = match self.required {
            Some(_) => required.next_multiple_of(block).max(VOLUME_BYTES_MIN),
            None => (required / block * block).max(VOLUME_BYTES_MIN),
        };
        if size > limit {
            return Err(Refusal::CapacityOutOfRange(format!(
                "a volume has whole blocks of {block} bytes and at least {VOLUME_BYTES_MIN}: the \
                 smallest that holds {required} has {size}, and the limit is {limit}"
            )));
        }
        Ok(size)
    }

    /// Why a volume of this size is not what was asked for; `None` when it is.
    pub fn problem_with(&self, size: u64) -> Option<String> {
        match (self.required, self.limit) {
            (Some(required), _) if size < required => {
                Some(format!("it has {size} bytes, and {required} are required"))
            }
            (_, Some(limit)) if size > limit => {
                Some(format!("it has {size} bytes, and the limit is {limit}"))
            }
            _ => None,
        }
    }
}

/// A number of bytes as the wire has it.
pub fn to_wire(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn size(required_bytes: i64, limit_bytes: i64) -> Result<u64, Code> {
        let range = CapacityRange { required_bytes, limit_bytes };
        Wanted::parse(Some(&range)).and_then(|wanted| wanted.size()).map_err(|r| r.code())
    }

    #[test]
    fn sizes_are_rounded_up_to_blocks_within_the_limit() {
        const MIB: i64 = 1 << 20;
        assert_eq!(Wanted::parse(None).unwrap().size().unwrap(), DEFAULT_BYTES);
        assert_eq!(size(0, 0), Ok(DEFAULT_BYTES));
        assert_eq!(size(1, 0), Ok(VOLUME_BYTES_MIN));
        assert_eq!(size(10 * MIB + 1, 0), Ok(10 * (1 << 20) + 4096));
        assert_eq!(size(10 * MIB, 10 * MIB), Ok(10 << 20));
        assert_eq!(size(0, 10 * MIB + 5), Ok(10 << 20));
        assert_eq!(size(10 * MIB + 1, 10 * MIB + 2), Err(Code::OutOfRange));
        assert_eq!(size(0, 4096), Err(Code::OutOfRange));
        assert_eq!(size(i64::MAX, 0), Err(Code::OutOfRange));
        assert_eq!(size(64 << 40, 0), Ok(64 << 40));
        assert_eq!(size((64 << 40) + 1, 0), Err(Code::OutOfRange));
        assert_eq!(size(-1, 0), Err(Code::InvalidArgument));
        assert_eq!(size(0, -1), Err(Code::InvalidArgument));
        assert_eq!(size(2 * MIB, MIB), Err(Code::InvalidArgument));
    }

    #[test]
    fn an_existing_volume_fits_or_does_not() {
        let range = CapacityRange { required_bytes: 1 << 21, limit_bytes: 1 << 22 };
        let wanted = Wanted::parse(Some(&range)).unwrap();
        assert_eq!(wanted.problem_with(1 << 21), None);
        assert_eq!(wanted.problem_with(1 << 22), None);
        assert!(wanted.problem_with(1 << 20).is_some());
        assert!(wanted.problem_with(1 << 23).is_some());
    }
}
