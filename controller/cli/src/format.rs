//! Times and texts for people.

use std::borrow::Cow;

/// A duration in at most two units: `350ms`, `42s`, `3m 5s`, `2h 10m`, `3d 4h`.
pub(crate) fn duration(ms: u64) -> String {
    let two = |big: u64, big_unit: &str, small: u64, small_unit: &str| match small {
        0 => format!("{big}{big_unit}"),
        _ => format!("{big}{big_unit} {small}{small_unit}"),
    };
    let seconds = ms / 1_000;
    match seconds {
        0 => format!("{ms}ms"),
        1..60 => format!("{seconds}s"),
        60..3_600 => two(seconds / 60, "m", seconds % 60, "s"),
        3_600..86_400 => two(seconds / 3_600, "h", seconds / 60 % 60, "m"),
        _ => two(seconds / 86_400, "d", seconds / 3_600 % 24, "h"),
    }
}

/// Time left until something; `expired` once it is past.
pub(crate) fn time_left(ms: i64) -> String {
    match u64::try_from(ms) {
        Ok(ms) if ms > 0 => duration(ms),
        _ => "expired".to_owned(),
    }
}

/// A time in UTC, `2026-11-24T22:56:22Z`. `ms` is milliseconds since 1970.
pub(crate) fn time(ms: u64) -> String {
    let seconds = ms / 1_000;
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // Count from 1 March of the year 0, in cycles of 400 years: leap days then stand at a year's end.
    let shifted = days + 719_468;
    let (cycle, day_of_cycle) = (shifted / 146_097, shifted % 146_097);
    let year_of_cycle =
        (day_of_cycle - day_of_cycle / 1_460 + day_of_cycle / 36_524 - day_of_cycle / 146_096) / 365;
    let day_of_year = day_of_cycle - (365 * year_of_cycle + year_of_cycle / 4 - year_of_cycle / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = cycle * 400 + year_of_cycle + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3_600, second / 60 % 60, second % 60)
}

/// Text of somebody else's, made safe for a terminal.
pub(crate) fn clean(text: &str) -> Cow<'_, str> {
    if text.chars().any(char::is_control) {
        Cow::Owned(
            text.chars()
                .flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] })
                .collect(),
        )
    } else {
        Cow::Borrowed(text)
    }
}

/// A key in one word: `name`, or `namespace/name`.
pub(crate) fn key(namespace: &str, name: &str) -> String {
    match namespace {
        "" => clean(name).into_owned(),
        _ => format!("{}/{}", clean(namespace), clean(name)),
    }
}

/// `yes` or `no`.
pub(crate) fn yes_no(truth: bool) -> String {
    if truth { "yes" } else { "no" }.to_owned()
}

/// `1 key`, `2 keys`.
pub(crate) fn count(number: usize, one: &str) -> String {
    format!("{number} {one}{}", if number == 1 { "" } else { "s" })
}

/// A word for a POSIX shell.
pub(crate) fn shell_word(word: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:,=@%+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        Cow::Borrowed(word)
    } else {
        Cow::Owned(format!("'{}'", word.replace('\'', r"'\''")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_have_at_most_two_units() {
        for (ms, text) in [
            (0, "0ms"),
            (999, "999ms"),
            (1_000, "1s"),
            (42_999, "42s"),
            (60_000, "1m"),
            (185_000, "3m 5s"),
            (7_800_000, "2h 10m"),
            (86_400_000, "1d"),
            (273_600_000, "3d 4h"),
        ] {
            assert_eq!(duration(ms), text);
        }
        assert_eq!(time_left(-5), "expired");
        assert_eq!(time_left(42_000), "42s");
        duration(u64::MAX);
    }

    #[test]
    fn times_are_in_utc() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400_000, "2000-02-29T00:00:00Z"),
            (1_709_251_199_999, "2024-02-29T23:59:59Z"),
            (1_709_251_200_000, "2024-03-01T00:00:00Z"),
            (1_795_560_982_000, "2026-11-24T22:56:22Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(time(ms), text);
        }
    }

    #[test]
    fn a_terminal_gets_no_control_characters() {
        assert_eq!(clean("a\u{1b}[2Jb"), r"a\u{1b}[2Jb");
        assert_eq!(key("n\n", "é"), r"n\n/é");
    }

    #[test]
    fn words_survive_a_shell() {
        assert_eq!(shell_word("./holdfast"), "./holdfast");
        assert_eq!(shell_word("a b"), "'a b'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
