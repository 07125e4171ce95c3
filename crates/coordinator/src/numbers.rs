//! Numbers as people read them.

use std::time::Duration;

/// Three digits that matter, with a sign.
pub(crate) fn signed(value: f64) -> String {
    let sign = match value {
        _ if value < 0.0 => "−",
        _ if value > 0.0 => "+",
        _ => "",
    };
    format!("{sign}{}", plain(value.abs()))
}

/// Three digits that matter.
pub(crate) fn plain(value: f64) -> String {
    let text = match value.abs() {
        size if size >= 1e5 => return format!("{value:.1e}"),
        size if size >= 100.0 => return format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        size if size >= 0.1 || size == 0.0 => format!("{value:.2}"),
        size if size >= 1e-3 => format!("{value:.3}"),
        _ => return format!("{value:.0e}"),
    };
    let trimmed = text.trim_end_matches('0').trim_end_matches('.');
    if trimmed.is_empty() {
        "0".into()
    } else {
        trimmed.to_owned()
    }
}

/// Digits in groups of three.
pub(crate) fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Such as `1 step`, `2,400 steps`, `2 entries`.
pub(crate) fn counted(count: u64, noun: &str) -> String {
    let count_text = grouped(count);
    match (count, noun.strip_suffix('y')) {
        (1, _) => format!("{count_text} {noun}"),
        (_, Some(stem)) => format!("{count_text} {stem}ies"),
        (_, None) => format!("{count_text} {noun}s"),
    }
}

/// Such as `850 ms`, `12.3 s`, `3 min 12 s`, `2 h 05 min`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0 => format!("{} ms", time.as_millis()),
        1..60 => format!("{:.1} s", time.as_secs_f64()),
        60..3600 => format!("{} min {:02} s", seconds / 60, seconds % 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Such as `850 B`, `12.3 MiB`, `1.61 GiB`.
#[cfg(any(feature = "local", test))]
pub(crate) fn bytes(bytes: u64) -> String {
    let exact = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_024_000 => format!("{} KiB", plain(exact / 1024.0)),
        1_024_000..1_048_576_000 => format!("{} MiB", plain(exact / f64::from(1 << 20))),
        _ => format!("{} GiB", plain(exact / f64::from(1 << 30))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        let check = |value: f64, text: &str| assert_eq!(signed(value), text);
        check(2.812, "+2.81");
        check(-42.04, "−42");
        check(-1394.6, "−1395");
        check(0.0, "0");
        check(f64::NAN, "NaN");
        check(0.0123, "+0.012");
        assert_eq!(plain(5.0), "5");
        assert_eq!(plain(500_000.0), "5.0e5");
    }

    #[test]
    fn counts_and_times_are_readable() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(61_135), "61,135");
        assert_eq!(grouped(7_241_732_096), "7,241,732,096");
        assert_eq!(counted(0, "step"), "0 steps");
        assert_eq!(counted(1, "step"), "1 step");
        assert_eq!(counted(2_400, "step"), "2,400 steps");
        assert_eq!(counted(1, "entry"), "1 entry");
        assert_eq!(counted(2, "entry"), "2 entries");
        assert_eq!(duration(Duration::from_millis(850)), "850 ms");
        assert_eq!(duration(Duration::from_millis(12_345)), "12.3 s");
        assert_eq!(duration(Duration::from_secs(192)), "3 min 12 s");
        assert_eq!(duration(Duration::from_mins(125)), "2 h 05 min");
        assert_eq!(bytes(12), "12 B");
        assert_eq!(bytes(2_200), "2.15 KiB");
        assert_eq!(bytes(64 << 20), "64 MiB");
        assert_eq!(bytes(1_729_000_000), "1.61 GiB");
    }
}
