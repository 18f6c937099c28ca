use std::sync::Arc;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::style::{Color, Modifier};
use viommu_virtio::viot::Bdf;

use super::super::page::tests::two_states;
use super::*;
use crate::serve::control::protocol::Plugged;
use crate::serve::control::{Control, Live};
use crate::serve::device::Kind;
use crate::serve::snapshot::tests::sample;

fn screen() -> Screen {
    let (directory, interval) = ("/run/vm".to_owned(), Duration::from_secs(1));
    Screen { directory, interval, history: two_states(), lost: None }
}

fn draw(screen: &Screen, width: u16, height: u16) -> Terminal<TestBackend> {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| screen.draw(frame)).unwrap();
    terminal
}

fn texts(terminal: &Terminal<TestBackend>) -> Vec<String> {
    let buffer = terminal.backend().buffer();
    let row = |y| (0..buffer.area.width).map(|x| buffer[(x, y)].symbol()).collect::<String>();
    (0..buffer.area.height).map(|y| row(y).trim_end().to_owned()).collect()
}

#[test]
fn the_screen_is_readable_at_80_columns_and_24_lines() {
    let terminal = draw(&screen(), 80, 24);
    assert_eq!(texts(&terminal), include_str!("screen.txt").lines().collect::<Vec<_>>());
    let buffer = terminal.backend().buffer();
    assert!(buffer[(0, 0)].modifier.contains(Modifier::BOLD));
}

#[test]
fn the_screen_takes_any_size() {
    let mut terminal = draw(&screen(), 80, 24);
    for (width, height) in [(1, 1), (200, 100), (10, 3), (80, 0), (0, 5), (80, 24)] {
        terminal.backend_mut().resize(width, height);
        terminal.autoresize().unwrap();
        terminal.draw(|frame| screen().draw(frame)).unwrap();
    }
    assert_eq!(texts(&terminal)[0], texts(&draw(&screen(), 80, 24))[0]);
}

#[test]
fn a_server_that_has_gone_is_said_over_what_was() {
    let mut screen = screen();
    let (sender, receiver) = mpsc::channel();
    sender.send(Err("nobody serves in /run/vm".into())).unwrap();
    screen.take(&receiver);
    let since = screen.lost.as_ref().unwrap().1;
    sender.send(Err("nobody serves in /run/vm".into())).unwrap();
    screen.take(&receiver);
    assert_eq!(screen.lost.as_ref().unwrap().1, since, "since the first time");
    let terminal = draw(&screen, 80, 24);
    let lines = texts(&terminal);
    assert!(lines[23].contains("gone for 0 s, trying again: nobody serves in /run/vm"), "{lines:#?}");
    assert!(lines[2].starts_with("MAP"), "{lines:#?}");
    let buffer = terminal.backend().buffer();
    assert_eq!(buffer[(1, 23)].bg, Color::Red);
    assert!(buffer[(0, 3)].modifier.contains(Modifier::DIM));
    sender.send(Ok(Box::new(sample()))).unwrap();
    screen.take(&receiver);
    assert!(screen.lost.is_none());
}

#[test]
fn keys_that_end_it_are_q_esc_and_control_c() {
    let key = |code, modifiers| KeyEvent::new(code, modifiers);
    assert!(ends(key(KeyCode::Char('q'), KeyModifiers::NONE)));
    assert!(ends(key(KeyCode::Esc, KeyModifiers::NONE)));
    assert!(ends(key(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    assert!(!ends(key(KeyCode::Char('c'), KeyModifiers::NONE)));
    let release = KeyEvent { kind: KeyEventKind::Release, ..key(KeyCode::Esc, KeyModifiers::NONE) };
    assert!(!ends(release));
}

struct Fake(u32);

impl Live for Fake {
    fn snapshot(&self, _: bool) -> Snapshot {
        Snapshot { pid: self.0, ..sample() }
    }

    fn plug(&self, _: Bdf, _: Kind) -> Result<Plugged, String> {
        Err("no".into())
    }

    fn unplug(&self, _: Bdf) -> Result<Plugged, String> {
        Err("no".into())
    }
}

#[test]
fn a_server_that_comes_back_is_reached_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("control.sock");
    let first = Control::start(&path, Arc::new(Fake(1))).unwrap();
    let client = Client::connect(directory.path()).unwrap();
    let states = fetch(directory.path().to_owned(), client, Duration::from_millis(10));
    let until = |what: &str, is: &dyn Fn(&State) -> bool| {
        for _ in 0..10_000 {
            if is(&states.recv_timeout(Duration::from_secs(30)).unwrap()) {
                return;
            }
        }
        panic!("{what}");
    };
    let of = |pid: u32| move |state: &State| state.as_ref().is_ok_and(|snapshot| snapshot.pid == pid);
    until("the first", &of(1));
    first.stop();
    until("nobody", &|state| state.as_ref().is_err_and(|why| why.contains("nobody serves")));
    let _second = Control::start(&path, Arc::new(Fake(2))).unwrap();
    until("the second", &of(2));
}
