//! Runs the program, and writes logs as QEMU does.

pub(crate) mod qemu;

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use serde_json::Value;

/// What a run left behind.
pub(crate) struct Run {
    pub(crate) status: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|why| panic!("{why}: {}\n{}", self.out, self.err))
    }
}

/// Runs `viommu` with `input` on standard input.
pub(crate) fn viommu(args: &[&str], input: &[u8]) -> Run {
    let mut child = Command::new(env!("CARGO_BIN_EXE_viommu"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    // It may be done before it has read all.
    let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap();
    Run {
        status: output.status.code().unwrap(),
        out: String::from_utf8(output.stdout).unwrap(),
        err: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Replays a log from standard input, with JSON output.
pub(crate) fn replay(log: &str, more: &[&str]) -> Run {
    let args: Vec<&str> = ["replay", "-", "--format", "json"].iter().chain(more).copied().collect();
    viommu(&args, log.as_bytes())
}

/// A number in a JSON object, by its path.
pub(crate) fn num(json: &Value, path: &str) -> u64 {
    json.pointer(path).and_then(Value::as_u64).unwrap_or_else(|| panic!("{path} in {json}"))
}

/// What every model must come to: all but what tells of the model, and the time.
pub(crate) fn without_model(mut json: Value) -> Value {
    let fields = json.as_object_mut().unwrap();
    assert!(fields.remove("model").is_some() && fields.remove("seconds").is_some());
    json
}

/// A path of this name in the directory for tests' files.
pub(crate) fn scratch(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()))
}

pub(crate) fn write(name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = scratch(name);
    std::fs::write(&path, bytes).unwrap();
    path
}
