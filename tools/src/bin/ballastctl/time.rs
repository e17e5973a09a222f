//! Points in time for people.

/// Milliseconds since 1970 as `2026-01-31 23:59:59 UTC`.
pub fn show_time(milliseconds: u64) -> String {
    let seconds = milliseconds / 1000;
    let (year, month, day) = date_of(seconds / 86_400);
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Year, month and day of a day counted from 1970-01-01 (Gregorian).
fn date_of(day: u64) -> (u64, u64, u64) {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let mut year = 1970 + day / DAYS_OF_400_YEARS * 400;
    let mut left = day % DAYS_OF_400_YEARS;
    while left >= days_of_year(year) {
        left -= days_of_year(year);
        year += 1;
    }
    let february = days_of_year(year) - 337;
    for (days, month) in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().zip(1..)
    {
        if left < days {
            return (year, month, left + 1);
        }
        left -= days;
    }
    unreachable!("a day of the year lies in one of its months")
}

fn days_of_year(year: u64) -> u64 {
    let leap = year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    365 + u64::from(leap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_dates() {
        for (seconds, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (1_700_000_000, "2023-11-14 22:13:20 UTC"),
            (1_709_251_199, "2024-02-29 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(show_time(seconds * 1000), text);
        }
        show_time(u64::MAX);
    }
}
