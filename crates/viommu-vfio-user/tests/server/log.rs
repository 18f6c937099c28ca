//! What the log says, and how often.

use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::common::*;

/// Keeps the warnings.
#[derive(Clone, Default)]
struct Warnings(Arc<Mutex<Vec<String>>>);

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!("{field}={value:?} "));
    }
}

impl Subscriber for Warnings {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::WARN
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.0.lock().unwrap().push(text.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[test]
fn warnings_when_a_client_goes_on_are_few_and_the_first() {
    let warnings = Warnings::default();
    tracing::subscriber::set_global_default(warnings.clone()).expect("no other test has one");
    // Other tests warn, too: ours are told by their addresses, and by the socket.
    let with = |text: &str| {
        let all = warnings.0.lock().unwrap();
        all.iter().filter(|warning| warning.contains(text)).cloned().collect::<Vec<_>>()
    };
    let server = Running::new();
    let unsealed = tempfile::tempfile().unwrap();
    unsealed.set_len(PAGE).unwrap();
    for _ in 0..2 {
        let mut client = server.client();
        for page in 0..100 {
            assert_ne!(client.map(Some(&unsealed), 0, 0xabcd_0000_0000 + page * PAGE, PAGE), 0);
        }
        for _ in 0..20 {
            Client::connect(&server.path).assert_closed();
        }
        drop(client);
        server.cleaned();
    }
    let windows = with("0xabcd00");
    assert_eq!(windows.len(), 2 * 4, "{windows:#?}");
    assert!(windows[0].contains("not sealed"), "{windows:#?}");
    assert!(windows[3].contains("others") && !windows[2].contains("others"), "{windows:#?}");
    let refused = with(server.path.to_str().unwrap());
    assert_eq!(refused.len(), 2 * 3, "{refused:#?}");
}
