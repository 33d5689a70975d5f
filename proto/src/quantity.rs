//! Kubernetes quantities (`100m`, `1.5Gi`, `2e3`) with exact arithmetic.
//!
//! A quantity is a whole number of nano-units; the magnitude is limited to what fits 63 bits of whole units. Parsing and the
//! canonical form follow `k8s.io/apimachinery/pkg/api/resource`, except that Kubernetes silently caps what is too
//! large, and here it is an error.

use std::{cmp::Ordering, fmt, str::FromStr};

const NANOS: i128 = 1_000_000_000;
/// Largest magnitude, in nano-units.
const LIMIT: i128 = i64::MAX as i128 * NANOS;
/// Digits after the point that are read; nobody means more, and exact rounding stays within 128 bits.
const FRACTION_DIGITS: usize = 18;

/// A text is no quantity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    /// The text does not have the form of a number.
    #[error(
        "{0:?} is not a quantity: want a number with an optional suffix (n u m k M G T P E Ki Mi Gi Ti Pi Ei or e3)"
    )]
    Malformed(String),
    /// The number is followed by something that is no unit.
    #[error("unknown unit {unit:?} in quantity {text:?}{}", hint(unit))]
    UnknownUnit {
        /// The whole quantity.
        text: String,
        /// What stands where a unit should be.
        unit: String,
    },
    /// More than 63 bits of whole units.
    #[error("quantity {0:?} is too large: the limit is 9223372036854775807")]
    TooLarge(String),
    /// More digits after the point than are read.
    #[error("quantity {0:?} has more than {FRACTION_DIGITS} digits after the point")]
    TooPrecise(String),
    /// A sum or difference left the range.
    #[error("the sum of quantities is too large: the limit is 9223372036854775807")]
    Overflow,
}

fn hint(unit: &str) -> String {
    let meant = match unit {
        "K" => "k or Ki",
        "ki" | "KI" | "kib" | "KiB" | "kiB" => "Ki",
        "kb" | "KB" | "kB" => "k",
        "mi" | "MI" | "MiB" | "mib" | "Mib" => "Mi",
        "mb" | "MB" | "Mb" => "M or Mi",
        "g" | "gb" | "GB" | "Gb" => "G or Gi",
        "gi" | "GI" | "GiB" | "gib" | "Gib" => "Gi",
        "t" | "tb" | "TB" => "T or Ti",
        "ti" | "TI" | "TiB" => "Ti",
        _ => return String::new(),
    };
    format!(" (did you mean {meant}?)")
}

/// How a quantity was written, and how its canonical form is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// `100m`, `12`, `3G`.
    #[default]
    DecimalSi,
    /// `64Mi`.
    BinarySi,
    /// `2e3`.
    DecimalExponent,
}

/// An exact quantity. Comparison looks at the value alone: `1` equals `1000m`.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

impl Quantity {
    /// Nothing.
    pub const ZERO: Quantity = Quantity { nanos: 0, format: Format::DecimalSi };

    /// Whole units, decimal form.
    pub fn from_units(units: i64) -> Quantity {
        // i64::MIN is one beyond the limit; nothing here tells it from its neighbour.
        Quantity { nanos: i128::from(units.max(-i64::MAX)) * NANOS, format: Format::DecimalSi }
    }

    /// Whole units, binary form: bytes.
    pub fn from_bytes(bytes: i64) -> Quantity {
        Quantity { format: Format::BinarySi, ..Quantity::from_units(bytes) }
    }

    /// Bytes as sizes are counted; more than a signed number holds is the largest one.
    pub fn from_size(bytes: u64) -> Quantity {
        Quantity::from_bytes(i64::try_from(bytes).unwrap_or(i64::MAX))
    }

    /// Thousandths, decimal form: CPU.
    pub fn from_milli(milli: i64) -> Quantity {
        Quantity { nanos: i128::from(milli) * (NANOS / 1000), format: Format::DecimalSi }
    }

    /// How it was written.
    pub fn format(self) -> Format {
        self.format
    }

    /// -1, 0 or 1.
    pub fn sign(self) -> i32 {
        self.nanos.signum() as i32
    }

    /// Whether it is nothing.
    pub fn is_zero(self) -> bool {
        self.nanos == 0
    }

    /// Whole units, rounded away from zero.
    pub fn value_ceil(self) -> i64 {
        // Fits: the limit is made of i64::MAX whole units.
        divide_away(self.nanos, NANOS) as i64
    }

    /// Thousandths, rounded away from zero; saturates for values beyond 9.2e15 units.
    pub fn milli_value_ceil(self) -> i64 {
        let milli = divide_away(self.nanos, NANOS / 1000);
        milli.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
    }

    /// Whether it is a whole number of `parts`ths of a unit (1: whole units, 1000: thousandths).
    pub fn is_whole_in(self, parts: u32) -> bool {
        // nanos * parts stays far below 128 bits.
        (self.nanos * i128::from(parts)) % NANOS == 0
    }

    /// The sum; its form is that of the first one that is not zero.
    pub fn checked_add(self, other: Quantity) -> Result<Quantity, QuantityError> {
        let format = if self.is_zero() { other.format } else { self.format };
        within_limit(self.nanos + other.nanos, format)
    }

    /// The difference; its form is that of the first one that is not zero.
    pub fn checked_sub(self, other: Quantity) -> Result<Quantity, QuantityError> {
        let format = if self.is_zero() { other.format } else { self.format };
        within_limit(self.nanos - other.nanos, format)
    }
}

fn within_limit(nanos: i128, format: Format) -> Result<Quantity, QuantityError> {
    if nanos.abs() > LIMIT { Err(QuantityError::Overflow) } else { Ok(Quantity { nanos, format }) }
}

fn divide_away(value: i128, by: i128) -> i128 {
    let quotient = value / by;
    if value % by == 0 { quotient } else { quotient + value.signum() }
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Quantity) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Quantity) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Quantity) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

/// What a suffix multiplies by.
struct Suffix {
    format: Format,
    /// Power of ten.
    decimal: i32,
    /// Power of two.
    binary: u32,
}

fn parse_suffix(text: &str) -> Option<Suffix> {
    let decimal = |decimal| Some(Suffix { format: Format::DecimalSi, decimal, binary: 0 });
    let binary = |binary| Some(Suffix { format: Format::BinarySi, decimal: 0, binary });
    match text {
        "n" => decimal(-9),
        "u" => decimal(-6),
        "m" => decimal(-3),
        "" => decimal(0),
        "k" => decimal(3),
        "M" => decimal(6),
        "G" => decimal(9),
        "T" => decimal(12),
        "P" => decimal(15),
        "E" => decimal(18),
        "Ki" => binary(10),
        "Mi" => binary(20),
        "Gi" => binary(30),
        "Ti" => binary(40),
        "Pi" => binary(50),
        "Ei" => binary(60),
        _ => {
            let exponent = text.strip_prefix(['e', 'E'])?;
            let digits = exponent.strip_prefix(['+', '-']).unwrap_or(exponent);
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return None;
            }
            // Beyond this no number is within the limits; the cut keeps absurd exponents out of the arithmetic.
            let magnitude = digits
                .trim_start_matches('0')
                .parse::<i32>()
                .unwrap_or(if digits.trim_matches('0').is_empty() { 0 } else { 1000 });
            let magnitude = magnitude.min(1000);
            let decimal = if exponent.starts_with('-') { -magnitude } else { magnitude };
            Some(Suffix { format: Format::DecimalExponent, decimal, binary: 0 })
        }
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Quantity, QuantityError> {
        let malformed = || QuantityError::Malformed(shorten(text));
        let (negative, unsigned) = match text.as_bytes().first() {
            Some(b'-') => (true, &text[1..]),
            Some(b'+') => (false, &text[1..]),
            _ => (false, text),
        };
        let (whole, rest) = split_digits(unsigned);
        let (fraction, rest) = match rest.strip_prefix('.') {
            Some(rest) => split_digits(rest),
            None => ("", rest),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(malformed());
        }
        let suffix = match parse_suffix(rest) {
            Some(suffix) => suffix,
            None if rest.bytes().all(|byte| byte.is_ascii_alphabetic()) => {
                return Err(QuantityError::UnknownUnit { text: shorten(text), unit: shorten(rest) });
            }
            None => return Err(malformed()),
        };
        let fraction = fraction.trim_end_matches('0');
        if fraction.len() > FRACTION_DIGITS {
            return Err(QuantityError::TooPrecise(shorten(text)));
        }
        let nanos = nanos(whole.trim_start_matches('0'), fraction, &suffix).filter(|nanos| *nanos <= LIMIT);
        let nanos = nanos.ok_or_else(|| QuantityError::TooLarge(shorten(text)))?;
        Ok(Quantity { nanos: if negative { -nanos } else { nanos }, format: suffix.format })
    }
}

/// Error messages quote the input; a megabyte of digits must not come back as one.
fn shorten(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn split_digits(text: &str) -> (&str, &str) {
    text.split_at(text.bytes().take_while(u8::is_ascii_digit).count())
}

/// The magnitude in nano-units, what is below rounded up; `None` when it is too large.
fn nanos(whole: &str, fraction: &str, suffix: &Suffix) -> Option<i128> {
    let digits = whole.bytes().chain(fraction.bytes());
    let number = digits.map(|digit| i128::from(digit - b'0'));
    let mut value = number.into_iter().try_fold(0i128, |sum, digit| sum.checked_mul(10)?.checked_add(digit))?;
    if value == 0 {
        return Some(0);
    }
    value = value.checked_mul(1i128 << suffix.binary)?;
    let scale = suffix.decimal - fraction.len() as i32 + 9;
    if scale >= 0 {
        return value.checked_mul(10i128.checked_pow(scale as u32)?);
    }
    match 10i128.checked_pow(scale.unsigned_abs()) {
        Some(divisor) => Some(divide_away(value, divisor)),
        None => Some(1),
    }
}

impl fmt::Display for Quantity {
    /// The canonical form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        let small = self.nanos.abs() < 1024 * NANOS;
        let format = match self.format {
            // A binary form would lose the fraction, or say nothing.
            Format::BinarySi if small || self.nanos % NANOS != 0 => Format::DecimalSi,
            format => format,
        };
        if format == Format::BinarySi {
            let (mut number, mut power) = (self.nanos / NANOS, 0);
            while number % 1024 == 0 && power < 6 {
                (number, power) = (number / 1024, power + 1);
            }
            return write!(f, "{number}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][power]);
        }
        let (mut number, mut power) = (self.nanos, 0);
        while number % 1000 == 0 && power < 9 {
            (number, power) = (number / 1000, power + 1);
        }
        match (format, 3 * power as i32 - 9) {
            (Format::DecimalExponent, 0) => write!(f, "{number}"),
            (Format::DecimalExponent, exponent) => write!(f, "{number}e{exponent}"),
            _ => write!(f, "{number}{}", ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"][power]),
        }
    }
}

/// The canonical form of a text, or the text itself when it is no quantity (validation reports it).
pub fn canonical(text: &str) -> String {
    text.parse::<Quantity>().map_or_else(|_| text.to_owned(), |quantity| quantity.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quantity(text: &str) -> Quantity {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    /// Input, canonical form, whole units up, thousandths up.
    const TABLE: &[(&str, &str, i64, i64)] = &[
        ("0", "0", 0, 0),
        ("-0", "0", 0, 0),
        ("0n", "0", 0, 0),
        ("0Ki", "0", 0, 0),
        ("0e3", "0", 0, 0),
        ("0.0", "0", 0, 0),
        ("000", "0", 0, 0),
        ("1", "1", 1, 1000),
        ("+1", "1", 1, 1000),
        ("-1", "-1", -1, -1000),
        ("01", "1", 1, 1000),
        ("0012", "12", 12, 12_000),
        ("1.", "1", 1, 1000),
        ("1.0", "1", 1, 1000),
        (".5", "500m", 1, 500),
        ("0.5", "500m", 1, 500),
        ("-0.5", "-500m", -1, -500),
        ("1.5", "1500m", 2, 1500),
        ("100m", "100m", 1, 100),
        ("1000m", "1", 1, 1000),
        ("1500m", "1500m", 2, 1500),
        ("2000m", "2", 2, 2000),
        ("0.1", "100m", 1, 100),
        ("0.001", "1m", 1, 1),
        ("0.0001", "100u", 1, 1),
        ("0.1m", "100u", 1, 1),
        ("0.0000001", "100n", 1, 1),
        ("1n", "1n", 1, 1),
        ("0.1n", "1n", 1, 1),
        ("1.1n", "2n", 1, 1),
        ("-0.1n", "-1n", -1, -1),
        ("0.0000000001", "1n", 1, 1),
        ("1e-10", "1e-9", 1, 1),
        ("1e-999", "1e-9", 1, 1),
        ("1e-99999999999999999999", "1e-9", 1, 1),
        ("1000n", "1u", 1, 1),
        ("1u", "1u", 1, 1),
        ("1000u", "1m", 1, 1),
        ("999u", "999u", 1, 1),
        ("1001u", "1001u", 1, 2),
        ("10", "10", 10, 10_000),
        ("999", "999", 999, 999_000),
        ("1000", "1k", 1000, 1_000_000),
        ("1001", "1001", 1001, 1_001_000),
        ("1024", "1024", 1024, 1_024_000),
        ("10000", "10k", 10_000, 10_000_000),
        ("1000000", "1M", 1_000_000, 1_000_000_000),
        ("1k", "1k", 1000, 1_000_000),
        ("1.5k", "1500", 1500, 1_500_000),
        ("0.5k", "500", 500, 500_000),
        ("1000k", "1M", 1_000_000, 1_000_000_000),
        ("1M", "1M", 1_000_000, 1_000_000_000),
        ("1.005M", "1005k", 1_005_000, 1_005_000_000),
        ("1G", "1G", 1_000_000_000, 1_000_000_000_000),
        ("1T", "1T", 1_000_000_000_000, 1_000_000_000_000_000),
        ("1P", "1P", 1_000_000_000_000_000, 1_000_000_000_000_000_000),
        ("1E", "1E", 1_000_000_000_000_000_000, i64::MAX),
        ("9E", "9E", 9_000_000_000_000_000_000, i64::MAX),
        ("0.9E", "900P", 900_000_000_000_000_000, i64::MAX),
        ("9223372036854775807", "9223372036854775807", i64::MAX, i64::MAX),
        ("-9223372036854775807", "-9223372036854775807", -i64::MAX, i64::MIN),
        ("1Ki", "1Ki", 1024, 1_024_000),
        ("-1Ki", "-1Ki", -1024, -1_024_000),
        ("1Mi", "1Mi", 1 << 20, (1 << 20) * 1000),
        ("1Gi", "1Gi", 1 << 30, (1 << 30) * 1000),
        ("1Ti", "1Ti", 1 << 40, (1 << 40) * 1000),
        ("1Pi", "1Pi", 1 << 50, (1 << 50) * 1000),
        ("1Ei", "1Ei", 1 << 60, i64::MAX),
        ("7Ei", "7Ei", 7 << 60, i64::MAX),
        ("1.25Gi", "1280Mi", 1280 << 20, (1280 << 20) * 1000),
        ("1.5Gi", "1536Mi", 1536 << 20, (1536 << 20) * 1000),
        ("0.5Gi", "512Mi", 512 << 20, (512 << 20) * 1000),
        ("0.5Mi", "512Ki", 512 << 10, (512 << 10) * 1000),
        ("0.5Ki", "512", 512, 512_000),
        ("0.1Ki", "102400m", 103, 102_400),
        ("1.1Ki", "1126400m", 1127, 1_126_400),
        ("0.1Mi", "104857600m", 104_858, 104_857_600),
        ("1024Ki", "1Mi", 1 << 20, (1 << 20) * 1000),
        ("1025Ki", "1025Ki", 1025 << 10, (1025 << 10) * 1000),
        ("1000Ki", "1000Ki", 1_024_000, 1_024_000_000),
        ("2048Mi", "2Gi", 2 << 30, (2 << 30) * 1000),
        ("1023Mi", "1023Mi", 1023 << 20, (1023 << 20) * 1000),
        ("64Mi", "64Mi", 64 << 20, (64 << 20) * 1000),
        ("0.25Ei", "256Pi", 256 << 50, i64::MAX),
        ("1048576Ti", "1Ei", 1 << 60, i64::MAX),
        ("1e0", "1", 1, 1000),
        ("1E0", "1", 1, 1000),
        ("1e3", "1e3", 1000, 1_000_000),
        ("1E3", "1e3", 1000, 1_000_000),
        ("1e+3", "1e3", 1000, 1_000_000),
        ("1E+3", "1e3", 1000, 1_000_000),
        ("1e03", "1e3", 1000, 1_000_000),
        ("1e-3", "1e-3", 1, 1),
        ("1.5e3", "1500", 1500, 1_500_000),
        ("15e2", "1500", 1500, 1_500_000),
        ("12e6", "12e6", 12_000_000, 12_000_000_000),
        ("1000e3", "1e6", 1_000_000, 1_000_000_000),
        ("1e4", "10e3", 10_000, 10_000_000),
        ("1e5", "100e3", 100_000, 100_000_000),
        ("5e-1", "500e-3", 1, 500),
        ("1e-6", "1e-6", 1, 1),
        ("1e18", "1e18", 1_000_000_000_000_000_000, i64::MAX),
        ("0e999999999999", "0", 0, 0),
        ("1e000000000000000000", "1", 1, 1000),
        ("3.141592653", "3141592653n", 4, 3142),
        ("3.1415926535", "3141592654n", 4, 3142),
        ("-3.1415926535", "-3141592654n", -4, -3142),
        ("0.000000000000000001", "1n", 1, 1),
        ("1.000000000000000000000000000000", "1", 1, 1000),
        ("250000000000000000000000n", "250T", 250_000_000_000_000, 250_000_000_000_000_000),
    ];

    #[test]
    fn parse_print_and_round() {
        for (text, printed, units, milli) in TABLE {
            let value = quantity(text);
            assert_eq!(value.to_string(), *printed, "{text}");
            assert_eq!(value.value_ceil(), *units, "{text}");
            assert_eq!(value.milli_value_ceil(), *milli, "{text}");
            assert_eq!(canonical(printed), *printed, "canonical form is a fixed point");
            assert_eq!(quantity(printed), value, "{text}");
        }
        assert!(TABLE.len() > 100);
    }

    #[test]
    fn what_is_no_quantity() {
        use QuantityError::*;
        let malformed = [
            "", "+", "-", ".", "-.", "m", "Ki", "1 ", " 1", "1 Gi", "1.1.M", "1+1.0M", "1,5", "-3.01e-", "1e+", "0x10",
            "1_000", "--1", "+-1", "1e1.5", "1Mi5", "½", "1é", "∞",
        ];
        for text in malformed {
            let is = text.parse::<Quantity>();
            assert!(matches!(is, Err(Malformed(_) | UnknownUnit { .. })), "{text}: {is:?}");
        }
        for unit in ["K", "ki", "mi", "gi", "GB", "MiB", "g", "i", "am", "mm", "e", "Em", "cores", "NaN"] {
            let text = format!("1{unit}");
            assert!(matches!(text.parse::<Quantity>(), Err(UnknownUnit { .. })), "{text}");
        }
        for text in
            ["9223372036854775808", "8Ei", "10E", "1e19", "1e999", "1e99999999999999999999", "9.3E", "-8Ei", "16384Pi"]
        {
            assert!(matches!(text.parse::<Quantity>(), Err(TooLarge(_))), "{text}");
        }
        assert!(matches!("1".repeat(1 << 20).parse::<Quantity>(), Err(TooLarge(text)) if text.len() < 80));
        assert!(matches!("0.1234567890123456789".parse::<Quantity>(), Err(TooPrecise(_))));
        let hint = "1GB".parse::<Quantity>().unwrap_err().to_string();
        assert_eq!(hint, "unknown unit \"GB\" in quantity \"1GB\" (did you mean G or Gi?)");
    }

    #[test]
    fn arithmetic() {
        let table = [
            ("1", "500m", "1500m", "500m"),
            ("1Gi", "512Mi", "1536Mi", "512Mi"),
            ("0", "1Ki", "1Ki", "-1Ki"),
            ("1Ki", "1000", "2024", "24"),
            ("1k", "1Ki", "2024", "-24"),
            ("1e3", "1", "1001", "999"),
            ("1n", "1n", "2n", "0"),
        ];
        for (a, b, sum, difference) in table {
            assert_eq!(quantity(a).checked_add(quantity(b)).unwrap().to_string(), sum, "{a} + {b}");
            assert_eq!(quantity(a).checked_sub(quantity(b)).unwrap().to_string(), difference, "{a} - {b}");
        }
        let most = Quantity::from_units(i64::MAX);
        assert_eq!(most.checked_add(quantity("1n")), Err(QuantityError::Overflow));
        assert_eq!(Quantity::from_units(i64::MIN).checked_sub(quantity("1n")), Err(QuantityError::Overflow));
    }

    #[test]
    fn comparison_is_by_value() {
        for (less, more) in [("999m", "1"), ("1k", "1Ki"), ("-1", "0"), ("1M", "1Mi"), ("1n", "2n"), ("1e3", "1Ki")] {
            assert!(quantity(less) < quantity(more), "{less} {more}");
        }
        for (a, b) in [("1", "1000m"), ("1Ki", "1024"), ("1e3", "1k"), ("0", "0Ki"), ("1.5", "1500m")] {
            assert_eq!(quantity(a), quantity(b));
        }
        assert!(
            quantity("1m").is_whole_in(1000) && !quantity("1u").is_whole_in(1000) && !quantity("1m").is_whole_in(1)
        );
        assert_eq!(Quantity::from_milli(250).to_string(), "250m");
        assert_eq!(Quantity::from_bytes(256 << 20).to_string(), "256Mi");
    }
}
