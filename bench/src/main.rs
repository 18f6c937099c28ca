//! Measures the goals for speed and size, ours beside other structures in one run: `cargo xtask bench`.
#![deny(unsafe_code)]

mod cells;
mod clock;
mod goals;
mod load;
mod ours;
mod peers;
mod report;
mod row;
mod table;
mod work;

use std::process::ExitCode;

use anyhow::ensure;
use clap::{Parser, Subcommand};

use crate::cells::Cells;
use crate::goals::{GOALS, Run};
use crate::load::Effort;
use crate::work::{Who, Work};

/// Measures the goals for speed and size.
#[derive(Parser)]
#[command(bin_name = "cargo xtask bench", disable_help_subcommand = true)]
struct Options {
    /// Print a list of objects instead of a table.
    #[arg(long)]
    json: bool,
    /// Fewer rounds and smaller tables: under a minute, for a look.
    #[arg(long)]
    quick: bool,
    /// As little as makes every goal print a row; the figures mean nothing.
    #[arg(long, hide = true)]
    smoke: bool,
    /// Only these goals: G1,G7. `none` is what is reported without a goal.
    #[arg(long, value_delimiter = ',', value_name = "GOALS")]
    only: Vec<String>,
    #[command(subcommand)]
    cell: Option<Cell>,
}

#[derive(Subcommand)]
enum Cell {
    /// Does one piece of work in this process and prints its rounds.
    #[command(hide = true)]
    Cell { work: Work, who: Who, effort: Effort, figures: Vec<String> },
}

fn main() -> anyhow::Result<ExitCode> {
    let options = Options::parse();
    if let Some(Cell::Cell { work, who, effort, figures }) = options.cell {
        println!("{}", serde_json::to_string(&work::run(work, who, effort, &figures)?)?);
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(load) = clock::load()
        && load > 0.5
    {
        eprintln!("note: other work is running (load {load}): what needs two CPUs is slower than it is");
    }
    let effort = match (options.smoke, options.quick) {
        (true, _) => Effort::Smoke,
        (false, true) => Effort::Quick,
        (false, false) => Effort::Full,
    };
    for name in &options.only {
        ensure!(GOALS.iter().any(|goal| goal.name.eq_ignore_ascii_case(name)), "{name}: no such goal");
    }
    let chosen: Vec<_> = GOALS
        .iter()
        .filter(|goal| {
            options.only.is_empty() || options.only.iter().any(|name| goal.name.eq_ignore_ascii_case(name))
        })
        .collect();
    let wanted = chosen.iter().flat_map(|goal| goal.needs).copied().collect();
    let mut run = Run { effort, cells: Cells::new(effort, wanted) };
    let mut rows = Vec::new();
    for pass in 0..effort.passes() {
        if pass > 0 {
            run.cells.once_more()?;
        }
        rows.clear();
        for goal in &chosen {
            rows.extend((goal.rows)(&mut run)?);
        }
    }
    if options.json {
        println!("{}", report::json(&rows)?);
    } else {
        print!("{}", report::table(&rows));
        let judged = rows.iter().filter(|row| row.met.is_some()).count();
        let met = rows.iter().filter(|row| row.met == Some(true)).count();
        println!("\n{met} of {judged} met");
    }
    for missing in &run.cells.missing {
        eprintln!("*** NOT MEASURED: {missing} ***");
    }
    if effort != Effort::Full {
        eprintln!("note: fewer rounds and smaller tables than the goals are stated for");
    }
    Ok(ExitCode::SUCCESS)
}
