//! Stages, run one after the other, timed, with a table at the end.

use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;

use crate::context::Context;

/// One thing to check.
pub(crate) struct Stage {
    /// As `--only` takes it.
    pub(crate) name: &'static str,
    /// What it checks, in half a line.
    pub(crate) about: &'static str,
    /// Does it.
    pub(crate) run: fn(&Context) -> anyhow::Result<Outcome>,
}

/// How a stage without error ended.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// All is well; what is worth a note in the table.
    Passed(String),
    /// Not checked, and why.
    Skipped(String),
}

impl Outcome {
    /// A pass that needs no note.
    pub(crate) fn passed() -> Outcome {
        Outcome::Passed(String::new())
    }
}

/// Options of `cargo xtask test`.
#[derive(Args)]
pub(crate) struct Options {
    /// Run only this stage; may be given several times.
    #[arg(long, value_name = "STAGE")]
    only: Vec<String>,
    /// List the stages and run none.
    #[arg(long)]
    list: bool,
    /// Also run the long live cases; a guest kernel that cannot be built is a failure.
    #[arg(long)]
    pub(crate) full: bool,
    /// Go on after a stage that failed.
    #[arg(long)]
    keep_going: bool,
}

/// Runs the stages that the options choose; whether none failed.
///
/// # Errors
///
/// If a stage is named that there is not, or nothing can be printed.
pub(crate) fn run(stages: &[Stage], options: &Options, context: &Context) -> anyhow::Result<bool> {
    if options.list {
        for stage in stages {
            println!("{:<22}{}", stage.name, stage.about);
        }
        return Ok(true);
    }
    for name in &options.only {
        if !stages.iter().any(|stage| stage.name == name) {
            bail!("there is no stage {name}: see cargo xtask test --list");
        }
    }

    let begun = Instant::now();
    let mut rows: Vec<Row> = Vec::new();
    let mut failed = false;
    for stage in stages {
        if !options.only.is_empty() && !options.only.iter().any(|name| stage.name == name) {
            continue;
        }
        if failed && !options.keep_going {
            rows.push(Row { name: stage.name, result: "not run", time: None, note: String::new() });
            continue;
        }
        println!("== {}: {}", stage.name, stage.about);
        let stage_begun = Instant::now();
        let (result, note) = match (stage.run)(context) {
            Ok(Outcome::Passed(note)) => ("passed", note),
            Ok(Outcome::Skipped(why)) => ("SKIPPED", why),
            Err(error) => {
                failed = true;
                ("FAILED", format!("{error:#}"))
            }
        };
        let time = stage_begun.elapsed();
        let colon = if note.is_empty() { "" } else { ": " };
        println!("== {} {result} in {}{colon}{note}\n", stage.name, seconds(time));
        rows.push(Row { name: stage.name, result, time: Some(time), note });
    }

    for row in &rows {
        let time = row.time.map_or_else(|| "-".to_owned(), seconds);
        let note = row.note.lines().next().unwrap_or("");
        println!("{}", format!("{:<22}{:>9}  {:<8} {note}", row.name, time, row.result).trim_end());
    }
    let skipped = rows.iter().filter(|row| row.result == "SKIPPED").count();
    let skipped = if skipped == 0 { String::new() } else { format!(", {skipped} skipped") };
    let verdict = if failed { "FAILED" } else { "PASSED" };
    println!("\n{verdict}{skipped}, {} in all", seconds(begun.elapsed()));
    Ok(!failed)
}

struct Row {
    name: &'static str,
    result: &'static str,
    time: Option<Duration>,
    note: String,
}

fn seconds(time: Duration) -> String {
    format!("{:.1} s", time.as_secs_f64())
}
