//! What goes over the control socket: a line of JSON each way.

use serde::{Deserialize, Serialize};

use crate::serve::snapshot::Snapshot;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, deny_unknown_fields)]
pub(crate) enum Request {
    /// The live state.
    Get {
        /// What.
        get: What,
        /// With all mappings.
        #[serde(default)]
        mappings: bool,
    },
    /// A device comes.
    Plug {
        /// Which, and where.
        plug: Plug,
    },
    /// A device goes.
    Unplug {
        /// Which.
        unplug: Unplug,
    },
}

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    /// [`Snapshot`].
    Snapshot,
}

/// A device that is to come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Plug {
    /// Where: `01:00.0`.
    pub(crate) address: String,
    /// What, as in the options: `rng`. Paths are absolute.
    pub(crate) device: String,
}

/// A device that is to go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Unplug {
    /// Where it is.
    pub(crate) address: String,
}

/// A device that has come, or gone.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Plugged {
    /// Where.
    pub(crate) address: String,
    /// The path of its socket.
    pub(crate) socket: String,
    /// What QEMU is to be told over QMP, a line.
    pub(crate) qmp: String,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer {
    /// To [`Request::Get`].
    Snapshot(Box<Snapshot>),
    /// To [`Request::Plug`].
    Plugged(Plugged),
    /// To [`Request::Unplug`].
    Unplugged(Plugged),
    /// To what cannot be done or understood.
    Error(String),
}

impl Request {
    /// Reads a line.
    ///
    /// # Errors
    /// What the answer says.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, String> {
        let value: serde_json::Value =
            serde_json::from_slice(line).map_err(|why| format!("this is not a line of JSON: {why}"))?;
        serde_json::from_value(value).map_err(|_| {
            "a request is {\"get\":\"snapshot\",\"mappings\":false}, {\"plug\":{\"address\":..,\"device\":..}} or \
             {\"unplug\":{\"address\":..}}"
                .to_owned()
        })
    }
}

/// A value as a line.
pub(crate) fn line(value: &impl Serialize) -> Vec<u8> {
    // None of the types has keys or numbers that JSON cannot have.
    let mut line = serde_json::to_vec(value).unwrap_or_else(|_| b"{\"error\":\"no JSON\"}".to_vec());
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_read_as_they_are_written() {
        let plug = Plug { address: "01:00.0".into(), device: "rng".into() };
        for (request, text) in [
            (Request::Get { get: What::Snapshot, mappings: true }, r#"{"get":"snapshot","mappings":true}"#),
            (Request::Plug { plug }, r#"{"plug":{"address":"01:00.0","device":"rng"}}"#),
            (
                Request::Unplug { unplug: Unplug { address: "01:00.0".into() } },
                r#"{"unplug":{"address":"01:00.0"}}"#,
            ),
        ] {
            assert_eq!(line(&request), format!("{text}\n").as_bytes());
            assert_eq!(Request::parse(text.as_bytes()), Ok(request));
        }
        let short = Request::parse(br#"{"get":"snapshot"}"#);
        assert_eq!(short, Ok(Request::Get { get: What::Snapshot, mappings: false }));
    }

    #[test]
    fn what_is_no_request_is_refused_in_words() {
        for text in ["", "{", "\u{0}", "1", "{}", r#"{"get":"all"}"#, r#"{"plug":{"address":"x"}}"#] {
            let said = Request::parse(text.as_bytes()).unwrap_err();
            assert!(said.contains("JSON") || said.contains("a request is"), "{text:?}: {said}");
        }
        assert!(Request::parse(br#"{"get":"snapshot","more":1}"#).is_err());
        assert!(Request::parse(&b"[".repeat(4000)).is_err());
    }
}
