//! Work in processes of their own, one after the other, each done once.

use std::collections::BTreeMap;
use std::env;
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use crate::load::Effort;
use crate::work::{Figures, Who, Work};

/// The subcommand that does one piece of work; nobody calls it but this program.
pub(crate) const CELL: &str = "cell";

/// What has been measured so far.
pub(crate) struct Cells {
    effort: Effort,
    /// Names of figures wanted of the works that have several.
    wanted: Vec<(Work, &'static str)>,
    done: BTreeMap<(Work, Who), Option<Figures>>,
    /// What could not be measured, and why.
    pub(crate) missing: Vec<String>,
}

impl Cells {
    pub(crate) fn new(effort: Effort, wanted: Vec<(Work, &'static str)>) -> Self {
        Self { effort, wanted, done: BTreeMap::new(), missing: Vec::new() }
    }

    /// Our figures of a piece of work.
    ///
    /// # Errors
    /// It has failed.
    pub(crate) fn ours(&mut self, work: Work) -> anyhow::Result<&Figures> {
        self.measure(work, Who::Viommu)?;
        self.done.get(&(work, Who::Viommu)).and_then(Option::as_ref).context("it has been measured")
    }

    /// A peer's; `None` when it cannot be measured here, which has been said.
    pub(crate) fn peer(&mut self, work: Work, who: Who) -> Option<&Figures> {
        if let Err(error) = self.measure(work, who) {
            let why = format!("{}: {error:#}", who.name());
            if !self.missing.contains(&why) {
                eprintln!("\n*** NOT MEASURED: {why}: its column stays empty ***\n");
                self.missing.push(why);
            }
            self.done.insert((work, who), None);
        }
        self.done.get(&(work, who))?.as_ref()
    }

    /// Measures all that is short once more, and puts the rounds to those there are: a machine has better and worse
    /// seconds, and who comes first should not have the better ones.
    ///
    /// # Errors
    /// What went well before has failed.
    pub(crate) fn once_more(&mut self) -> anyhow::Result<()> {
        let short = self.done.iter().filter(|(cell, figures)| cell.0.is_short() && figures.is_some());
        let short: Vec<_> = short.map(|(cell, _)| *cell).collect();
        for (work, who) in short {
            let again = self.run(work, who, true)?;
            if let Some(Some(figures)) = self.done.get_mut(&(work, who)) {
                for (name, rounds) in again {
                    figures.entry(name).or_default().extend(rounds);
                }
            }
        }
        Ok(())
    }

    fn measure(&mut self, work: Work, who: Who) -> anyhow::Result<()> {
        if !self.done.contains_key(&(work, who)) {
            let figures = self.run(work, who, false)?;
            self.done.insert((work, who), Some(figures));
        }
        Ok(())
    }

    /// In a process of its own; `again`: without what needs the table to be made anew each time.
    fn run(&self, work: Work, who: Who, again: bool) -> anyhow::Result<Figures> {
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map(|value| value.get_name().to_owned()).unwrap_or_default()
        };
        let work_name = name(&|| work.to_possible_value());
        eprintln!("measuring {work_name} of {}", who.name());
        let mut command = Command::new(env::current_exe()?);
        command.args([CELL, &work_name, &name(&|| who.to_possible_value())]);
        command.arg(name(&|| self.effort.to_possible_value()));
        let wanted = self.wanted.iter().filter(|(of, figure)| *of == work && !(again && *figure == "bulk"));
        // The first keeps the list from being empty, which would mean everything.
        command.arg("memory").args(wanted.map(|(_, figure)| figure));
        let output = command.stdin(Stdio::null()).output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("{}", said.trim().trim_start_matches("Error: "));
        }
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).context("the figures cannot be read")
    }
}
