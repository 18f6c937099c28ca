//! `convert IN OUT`: writes a history in viommu's own format and says what was in it.

use std::collections::BTreeMap;
use std::fs::File;

use viommu_trace::{History, Writer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(from), Some(to)) = (args.next(), args.next()) else {
        return Err("usage: convert IN OUT".into());
    };
    let start = std::time::Instant::now();
    let mut history = History::open(&from)?;
    let mut writer = Writer::new(File::create(to)?)?;
    let mut kinds = BTreeMap::<String, u64>::new();
    while let Some(entry) = history.next()? {
        let name: String = format!("{:?}", entry.event).chars().take_while(|c| c.is_alphanumeric()).collect();
        *kinds.entry(name).or_default() += 1;
        writer.write(&entry)?;
    }
    let records = writer.records();
    writer.finish()?;
    println!("{}: {} lines, {records} events in {:?}", history.format(), history.lines(), start.elapsed());
    for (name, count) in kinds {
        println!("{count:9} {name}");
    }
    println!("{:9} passed over: {:?}", history.passed_over().total(), history.passed_over().names());
    if let Some(attribution) = history.attribution() {
        println!("{attribution:?}");
    }
    Ok(())
}
