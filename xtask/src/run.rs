//! Runs a command and passes on those of its lines that tell something.

use std::{
    io::{BufRead, BufReader, Write},
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::context::Context;

/// What a command that succeeded has said.
#[derive(Debug, Default)]
pub(crate) struct Said {
    /// Tests that passed, over all test programs.
    pub(crate) passed: u64,
}

/// Runs a command without standard input, both its outputs in one stream.
///
/// # Errors
///
/// If the command cannot be started, or ends with anything but success.
pub(crate) fn run(context: &Context, command: Command) -> anyhow::Result<Said> {
    println!("$ {}", shown(&command));
    run_quietly(context, command)
}

/// As [`run`], without a line that says what is run.
pub(crate) fn run_quietly(context: &Context, mut command: Command) -> anyhow::Result<Said> {
    let name = command.get_program().to_string_lossy().into_owned();
    let (output, input) = std::io::pipe()?;
    command.stdin(Stdio::null()).stdout(input.try_clone()?).stderr(input);
    let mut child = command.spawn().with_context(|| format!("{name} does not start"))?;
    // The command holds the pipe's writing ends: without them the end of output is seen.
    drop(command);

    let mut filter = Filter { verbose: context.verbose, ..Filter::default() };
    // Not locked: others may have something to say meanwhile.
    let mut out = std::io::stdout();
    let mut reader = BufReader::new(output);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        for text in filter.pass(String::from_utf8_lossy(&line).trim_end()) {
            writeln!(out, "{text}")?;
        }
        line.clear();
    }
    out.flush()?;

    let status = child.wait()?;
    if !status.success() {
        bail!("{name}: {status}");
    }
    Ok(Said { passed: filter.passed })
}

/// The command as one would type it, with the variables that matter.
fn shown(command: &Command) -> String {
    let mut words = Vec::new();
    for (name, value) in command.get_envs() {
        if let (Some(name), Some(value)) = (name.to_str(), value)
            && !name.starts_with("CARGO_TERM_")
        {
            words.push(format!("{name}={:?}", value.to_string_lossy()));
        }
    }
    words.push(command.get_program().to_string_lossy().into_owned());
    words.extend(command.get_args().map(|word| {
        let word = word.to_string_lossy();
        if word.contains(' ') { format!("{word:?}") } else { word.into_owned() }
    }));
    words.join(" ")
}

/// The words with which cargo reports progress.
const PROGRESS: [&str; 19] = [
    "Adding",
    "Archiving",
    "Blocking",
    "Checking",
    "Compiling",
    "Documenting",
    "Downloaded",
    "Downloading",
    "Finished",
    "Fresh",
    "Generated",
    "Installing",
    "Locking",
    "Packaged",
    "Packaging",
    "Unpacking",
    "Updating",
    "Uploading",
    "Verifying",
];

/// Leaves out cargo's progress, tests that pass, and test programs without tests; counts what passed.
#[derive(Debug, Default)]
struct Filter {
    verbose: bool,
    passed: u64,
    /// The title of a test program that has not yet said anything.
    title: Option<String>,
}

impl Filter {
    /// The lines to print now that `line` has come.
    fn pass(&mut self, line: &str) -> Vec<String> {
        let plain = without_colour(line);
        let passed = count_of(&plain);
        self.passed += passed.unwrap_or(0);
        if self.verbose {
            return vec![line.to_owned()];
        }

        let first = plain.split_whitespace().next().unwrap_or("");
        let indented = plain.starts_with(' ');
        if indented && (first == "Running" || first == "Doc-tests") {
            self.title = Some(line.to_owned());
            return Vec::new();
        }
        let nothing = plain.is_empty()
            || (indented && PROGRESS.contains(&first))
            || (plain.starts_with("running ") && (plain.ends_with(" tests") || plain.ends_with(" test")))
            || (plain.starts_with("test ") && plain.ends_with(" ok"))
            || is_fuzzing(&plain)
            || plain == "warning: aborting upload due to dry run"
            || (passed == Some(0) && plain.contains("test result: ok"));
        if nothing {
            return Vec::new();
        }
        self.title.take().into_iter().chain([line.to_owned()]).collect()
    }
}

/// What libFuzzer says while nothing has failed, but for its last line. Its missing functions are the sanitizers'.
fn is_fuzzing(line: &str) -> bool {
    (line.starts_with('#') && line.contains(" exec/s: "))
        || line.starts_with("######")
        || line.contains("\" # Uses: ")
        || line.starts_with("INFO: ")
        || line.starts_with("WARNING: Failed to find function \"__sanitizer_")
}

/// The number in "test result: ok. 12 passed; ...".
fn count_of(line: &str) -> Option<u64> {
    let (_, rest) = line.strip_prefix("test result: ")?.split_once(". ")?;
    rest.split_once(" passed")?.0.parse().ok()
}

/// The line without the escape sequences that set colours.
fn without_colour(line: &str) -> String {
    let mut plain = String::with_capacity(line.len());
    let mut rest = line;
    while let Some((before, after)) = rest.split_once("\u{1b}[") {
        plain.push_str(before);
        rest = after.split_once('m').map_or("", |(_, after)| after);
    }
    plain.push_str(rest);
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed_on(lines: &[&str]) -> (Vec<String>, u64) {
        let mut filter = Filter::default();
        let shown = lines.iter().flat_map(|line| filter.pass(line)).collect();
        (shown, filter.passed)
    }

    #[test]
    fn filter_counts_tests_of_all_programs_and_hides_those_without() {
        let (shown, passed) = passed_on(&[
            "   Compiling a v0.1.0",
            "     Running unittests src/lib.rs (a)",
            "",
            "running 2 tests",
            "test one ... ok",
            "test two ... ok",
            "test result: ok. 2 passed; 0 failed; 0 ignored",
            "   Doc-tests a",
            "running 0 tests",
            "test result: ok. 0 passed; 0 failed; 0 ignored",
            "     Running tests/b.rs (b)",
            "test result: ok. 11 passed; 0 failed; 0 ignored",
        ]);
        assert_eq!(passed, 13);
        assert_eq!(
            shown,
            [
                "     Running unittests src/lib.rs (a)",
                "test result: ok. 2 passed; 0 failed; 0 ignored",
                "     Running tests/b.rs (b)",
                "test result: ok. 11 passed; 0 failed; 0 ignored",
            ]
        );
    }

    #[test]
    fn filter_passes_on_errors_and_failing_tests() {
        let lines = [
            "error[E0308]: mismatched types",
            "test a ... FAILED",
            "test result: FAILED. 0 passed; 1 failed",
        ];
        assert_eq!(passed_on(&lines).0, lines);
    }

    #[test]
    fn filter_passes_on_only_the_end_of_fuzzing() {
        let lines = [
            "WARNING: Failed to find function \"__sanitizer_print_stack_trace\".",
            "INFO: Seed: 1",
            "#9\tINITED cov: 9 ft: 9 corp: 1/199b exec/s: 0 rss: 27Mb",
            "###### Recommended dictionary. ######",
            "\"\\377\\377\" # Uses: 1592",
            "Done 20000 runs in 3 second(s)",
        ];
        assert_eq!(passed_on(&lines).0, ["Done 20000 runs in 3 second(s)"]);
    }

    #[test]
    fn filter_knows_progress_with_little_indent_and_in_colour() {
        assert!(passed_on(&[" Documenting a v0.1.0"]).0.is_empty());
        assert!(passed_on(&["\u{1b}[1m\u{1b}[92m   Compiling\u{1b}[0m a v0.1.0"]).0.is_empty());
    }
}
