//! `viommu convert`.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use viommu_trace::{ConvertError, History, Writer};

use crate::args::Convert;
use crate::progress::Progress;

/// Copies a history, and says how much there was.
///
/// # Errors
/// What cannot be read or written. What was read before it has been written, and the file is whole.
pub(crate) fn run(args: &Convert) -> Result<(), ConvertError> {
    let mut history = History::open(&args.from)?;
    let to_stdout = args.to == Path::new("-");
    let out: Box<dyn Write> =
        if to_stdout { Box::new(io::stdout().lock()) } else { Box::new(File::create(&args.to)?) };
    let mut writer = Writer::new(out)?;
    let progress = Progress::new(&history);
    let outcome = copy(&mut history, &mut writer, &progress);
    drop(progress);
    let events = writer.records();
    writer.finish()?;
    let (lines, passed, format) = (history.lines(), history.passed_over().total(), history.format());
    let said = format!("{events} events of {lines} lines ({format}); {passed} lines passed over\n");
    // Standard output may be the history itself.
    if to_stdout {
        io::stderr().write_all(said.as_bytes())?
    } else {
        io::stdout().write_all(said.as_bytes())?
    }
    outcome
}

fn copy(
    history: &mut History,
    writer: &mut Writer<Box<dyn Write>>,
    progress: &Progress,
) -> Result<(), ConvertError> {
    while let Some(entry) = history.next()? {
        writer.write(&entry)?;
        if writer.records().is_multiple_of(8192) {
            progress.show(history, writer.records());
        }
    }
    Ok(())
}
