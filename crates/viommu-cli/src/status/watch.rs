//! `--watch`: the page on a screen that refreshes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::Rect;
use ratatui::style::{Style, Stylize};
use ratatui::text::{self, Span};

use super::client::{Client, ClientError};
use super::page::{Line, Tone, page};
use super::rates::History;
use crate::serve::snapshot::Snapshot;

/// How long a key may go unseen, and a state that has come.
const GLANCE: Duration = Duration::from_millis(50);
/// Between two tries to reach a server that has gone.
const RETRY: Duration = Duration::from_millis(500);

/// What is on the screen.
struct Screen {
    directory: String,
    interval: Duration,
    history: History,
    /// Why there is nothing new, and since when.
    lost: Option<(String, Instant)>,
}

/// Shows the state until it is told to stop: q, Esc or Ctrl-C. The terminal is as before afterwards, also after an error
/// or a panic.
///
/// # Errors
/// What the terminal gives.
pub(super) fn run(directory: &Path, client: Client, interval: Duration) -> io::Result<()> {
    let states = fetch(directory.to_owned(), client, interval);
    let mut screen = Screen {
        directory: directory.display().to_string(),
        interval,
        history: History::default(),
        lost: None,
    };
    // A panic restores the terminal before it is reported; an error half-way leaves it to us.
    let mut terminal = match ratatui::try_init() {
        Ok(terminal) => terminal,
        Err(why) => {
            let _ = ratatui::try_restore();
            return Err(why);
        }
    };
    let outcome = loop {
        screen.take(&states);
        if let Err(why) = terminal.draw(|frame| screen.draw(frame)) {
            break Err(why);
        }
        match next_event() {
            Ok(Some(Event::Key(key))) if ends(key) => break Ok(()),
            // Whatever it is, the screen is drawn anew; a new size is asked for then.
            Ok(_) => {}
            Err(why) => break Err(why),
        }
    };
    let restored = ratatui::try_restore();
    outcome.and(restored)
}

fn next_event() -> io::Result<Option<Event>> {
    if event::poll(GLANCE)? { event::read().map(Some) } else { Ok(None) }
}

fn ends(key: KeyEvent) -> bool {
    let control_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    key.kind != KeyEventKind::Release && (control_c || matches!(key.code, KeyCode::Char('q') | KeyCode::Esc))
}

type State = Result<Box<Snapshot>, String>;

/// Asks on a thread of its own, so that keys are heard while a server is slow. It ends when nobody receives.
fn fetch(directory: PathBuf, client: Client, interval: Duration) -> Receiver<State> {
    let (states, receiver) = mpsc::channel();
    thread::spawn(move || ask(&directory, Some(client), interval, &states));
    receiver
}

fn ask(directory: &Path, mut client: Option<Client>, interval: Duration, states: &Sender<State>) {
    loop {
        let start = Instant::now();
        let connected = match client.take() {
            Some(client) => Ok(client),
            None => Client::connect(directory),
        };
        let state = connected.and_then(|mut connected| {
            let snapshot = connected.snapshot(false);
            if matches!(snapshot, Ok(_) | Err(ClientError::Refused(_))) {
                client = Some(connected);
            }
            snapshot
        });
        let pause = if state.is_ok() { interval } else { RETRY };
        let state = state.map(Box::new).map_err(|why| why.to_string());
        if states.send(state).is_err() {
            return;
        }
        thread::sleep(pause.saturating_sub(start.elapsed()));
    }
}

impl Screen {
    /// Takes what has come.
    fn take(&mut self, states: &Receiver<State>) {
        loop {
            match states.recv_timeout(Duration::ZERO) {
                Ok(Ok(snapshot)) => {
                    self.lost = None;
                    self.history.push(*snapshot);
                }
                Ok(Err(why)) => self.lose(why),
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => return self.lose("nothing asks any more".into()),
            }
        }
    }

    fn lose(&mut self, why: String) {
        let since = self.lost.take().map_or_else(Instant::now, |(_, since)| since);
        self.lost = Some((why, since));
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let Some(rows) = usize::from(area.height).checked_sub(1) else { return };
        let mut lines: Vec<text::Line<'_>> = page(&self.directory, &self.history, rows)
            .into_iter()
            .map(|Line(pieces)| {
                pieces.into_iter().map(|(tone, piece)| Span::styled(piece, style(tone))).collect()
            })
            .collect();
        if self.lost.is_some() {
            // What is shown is not what is.
            lines = lines.into_iter().map(|line: text::Line<'_>| line.dim()).collect();
        }
        let body = Rect { height: area.height.saturating_sub(1), ..area };
        frame.render_widget(text::Text::from(lines), body);
        let foot = Rect { y: area.y + area.height.saturating_sub(1), height: 1, ..area };
        frame.render_widget(self.foot(), foot);
    }

    fn foot(&self) -> text::Line<'static> {
        match &self.lost {
            Some((why, since)) => {
                let text = format!(" gone for {} s, trying again: {why}", since.elapsed().as_secs());
                text::Line::from(text).style(Style::new().white().on_red())
            }
            None => {
                let seconds = self.interval.as_secs_f64();
                text::Line::from(format!("every {seconds} s; q, Esc or Ctrl-C ends"))
                    .style(Style::new().dim())
            }
        }
    }
}

fn style(tone: Tone) -> Style {
    match tone {
        Tone::Plain => Style::new(),
        Tone::Head => Style::new().bold(),
        Tone::Good => Style::new().green(),
        Tone::Bad => Style::new().red().bold(),
        Tone::Soft => Style::new().dim(),
    }
}

#[cfg(test)]
mod tests;
