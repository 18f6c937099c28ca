//! `viommu replay`.

use std::io::{self, Write};
use std::time::Instant;

use crate::args::{Format, Replay};
use crate::input;
use crate::judge::{Judge, Options, Read, Reals, Summary};
use crate::progress::Progress;
use crate::report::stats::Stats;
use crate::report::{html, text};

/// How a replay ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    Agrees,
    Differs,
    Unreadable,
}

/// Replays, and prints what it came to.
///
/// # Errors
/// What stands in the way: an input that cannot be opened, a report that cannot be written.
pub(crate) fn run(args: &Replay) -> Result<Verdict, Box<dyn std::error::Error>> {
    let mut history = input::open(args.file.as_deref())?;
    let options = Options {
        model: args.model,
        fail_map: args.fail_map,
        fail_unmap: args.fail_unmap,
        unfence: args.unfence,
        limit_entries: args.limit_entries,
    };
    let reals = Reals::open(&args.mirror, args.mirror_endpoint)?;
    let stats = args.report.is_some().then(Stats::default);
    let mut judge = Judge::new(options, reals, history.format(), stats)?;
    let start = Instant::now();
    let progress = Progress::new(&history);
    let (mut count, mut error) = (0_u64, None);
    loop {
        match history.next() {
            Ok(Some(entry)) => {
                judge.take(&entry);
                if let Some((line, what)) = judge.inexpressible() {
                    let source = history.source();
                    return Err(format!("{source}:{line}: {what}: use --model direct").into());
                }
            }
            Ok(None) => break,
            Err(why) => {
                error = Some(why);
                break;
            }
        }
        count += 1;
        if count.is_multiple_of(8192) {
            progress.show(&history, judge.tally.operations());
        }
    }
    judge.end();
    drop(progress);
    let read = Read {
        source: history.source().to_owned(),
        lines: history.lines(),
        passed_over: history.passed_over().total(),
        attribution: history.attribution(),
        error: error.as_ref().map(ToString::to_string),
        seconds: start.elapsed().as_secs_f64(),
    };
    let summary = judge.summary(read);
    print(args.format, &summary)?;
    if let (Some(path), Some(stats)) = (&args.report, judge.into_stats()) {
        std::fs::write(path, html::page(&summary, &stats))
            .map_err(|why| format!("{}: {why}", path.display()))?;
    }
    if let Some(error) = error {
        eprintln!("viommu: {error}");
        return Ok(Verdict::Unreadable);
    }
    Ok(if summary.differences == 0 { Verdict::Agrees } else { Verdict::Differs })
}

fn print(format: Format, summary: &Summary) -> io::Result<()> {
    let outcome = match format {
        Format::Text => anstream::stdout().lock().write_all(text::page(summary).as_bytes()),
        Format::Json => {
            for difference in &summary.first_differences {
                eprintln!("{}:{}: {}", summary.history.source, difference.line, difference.what);
            }
            let json = serde_json::to_string(summary).map_err(io::Error::other)?;
            let mut out = io::stdout().lock();
            out.write_all(json.as_bytes()).and_then(|()| out.write_all(b"\n"))
        }
    };
    match outcome {
        // Who reads no further has seen enough.
        Err(why) if why.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        outcome => outcome,
    }
}
