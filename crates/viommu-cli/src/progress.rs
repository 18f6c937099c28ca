//! A progress bar, where somebody looks.

use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use viommu_trace::History;

/// Shown on standard error when that is a terminal.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    pub(crate) fn new(history: &History) -> Self {
        if !std::io::stderr().is_terminal() {
            return Self { bar: None };
        }
        let (bar, template) = match history.total_bytes() {
            Some(total) => {
                let template = "{wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {msg} {eta} left";
                (ProgressBar::new(total), template)
            }
            None => (ProgressBar::no_length(), "{spinner} {bytes} {bytes_per_sec} {msg} {elapsed}"),
        };
        bar.set_draw_target(ProgressDrawTarget::stderr_with_hz(10));
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        Self { bar: Some(bar) }
    }

    /// Shows where the history is; cheap enough for every few thousand entries.
    pub(crate) fn show(&self, history: &History, operations: u64) {
        if let Some(bar) = &self.bar {
            let seconds = bar.elapsed().as_secs_f64().max(1e-3);
            #[expect(clippy::cast_precision_loss, reason = "a rate to look at")]
            let rate = operations as f64 / seconds;
            bar.set_message(format!("{rate:.0} operations/s"));
            bar.set_position(history.bytes_read());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
