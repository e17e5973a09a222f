//! How long the caller of a request waits for its answer.

use std::time::Duration;

use tonic::Request;

/// What gRPC's header says, if the caller sent it.
pub fn timeout_of<T>(request: &Request<T>) -> Option<Duration> {
    let header = request.metadata().get("grpc-timeout")?.to_str().ok()?;
    parse(header)
}

/// Up to eight digits and a unit.
fn parse(header: &str) -> Option<Duration> {
    let (digits, unit) = header.split_at_checked(header.len().checked_sub(1)?)?;
    let number: u64 = digits.parse().ok()?;
    match unit {
        "H" => Some(Duration::from_secs(number.checked_mul(3600)?)),
        "M" => Some(Duration::from_secs(number.checked_mul(60)?)),
        "S" => Some(Duration::from_secs(number)),
        "m" => Some(Duration::from_millis(number)),
        "u" => Some(Duration::from_micros(number)),
        "n" => Some(Duration::from_nanos(number)),
        _ => None,
    }
    .map(|timeout| timeout.min(Duration::from_secs(24 * 3600)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(parse("15S"), Some(Duration::from_secs(15)));
        assert_eq!(parse("14999987u"), Some(Duration::from_micros(14_999_987)));
        assert_eq!(parse("2M"), Some(Duration::from_secs(120)));
        assert_eq!(parse("99999999H"), Some(Duration::from_secs(24 * 3600)));
        for wrong in ["", "S", "15", "15x", "-1S", "é"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
        let mut request = Request::new(());
        assert_eq!(timeout_of(&request), None);
        request.set_timeout(Duration::from_secs(3));
        assert_eq!(timeout_of(&request), Some(Duration::from_secs(3)));
    }
}
