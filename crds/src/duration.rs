//! Durations as people write them in manifests: `90s`, `15m`, `24h`, `1h30m`.

use std::{fmt, str::FromStr, time::Duration};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

/// A duration in the form `30s`, `15m`, `24h`, `7d` or a sum of such parts, largest unit first or not.
///
/// The API server refuses other texts by the pattern in the schema; [`DurationString::get`] parses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DurationString(pub String);

/// Why a text is no duration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseDurationError {
    /// The text does not have the form of a duration.
    #[error("`{0}` is not a duration; write a number and a unit such as 30s, 15m, 24h or 7d")]
    Form(String),
    /// The duration exceeds 2^64 milliseconds.
    #[error("the duration `{0}` is too long")]
    TooLong(String),
}

impl DurationString {
    /// The duration meant. Fails on texts that a schema check would have refused.
    pub fn get(&self) -> Result<Duration, ParseDurationError> {
        let form = || ParseDurationError::Form(self.0.clone());
        let too_long = || ParseDurationError::TooLong(self.0.clone());
        let mut rest = self.0.as_str();
        if rest.is_empty() {
            return Err(form());
        }
        let mut millis: u64 = 0;
        while !rest.is_empty() {
            let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
            if digits == 0 {
                return Err(form());
            }
            let (number, tail) = rest.split_at(digits);
            let unit_len = tail.bytes().take_while(|b| !b.is_ascii_digit()).count();
            let (unit, tail) = tail.split_at(unit_len);
            let factor: u64 = match unit {
                "ms" => 1,
                "s" => 1_000,
                "m" => 60_000,
                "h" => 3_600_000,
                "d" => 86_400_000,
                _ => return Err(form()),
            };
            let number: u64 = number.parse().map_err(|_| too_long())?;
            millis = number.checked_mul(factor).and_then(|part| millis.checked_add(part)).ok_or_else(too_long)?;
            rest = tail;
        }
        Ok(Duration::from_millis(millis))
    }
}

impl FromStr for DurationString {
    type Err = ParseDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let duration = Self(text.to_owned());
        duration.get().map(|_| duration)
    }
}

impl fmt::Display for DurationString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl JsonSchema for DurationString {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Duration".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "pattern": "^([0-9]+(ms|s|m|h|d))+$",
            "maxLength": 32,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_what_people_write() {
        for (text, seconds) in
            [("30s", 30), ("15m", 900), ("24h", 86_400), ("7d", 604_800), ("1h30m", 5_400), ("0s", 0)]
        {
            assert_eq!(DurationString(text.into()).get(), Ok(Duration::from_secs(seconds)), "{text}");
        }
        assert_eq!(DurationString("250ms".into()).get(), Ok(Duration::from_millis(250)));
    }

    #[test]
    fn refuses_everything_else() {
        for text in ["", "30", "s", "-5s", "1.5h", "5 m", "1w", "99999999999999999999d"] {
            assert!(DurationString(text.into()).get().is_err(), "{text}");
        }
    }
}
