//! Lines that the log writes about itself, and a panic's last words, in the format of all other lines.
//!
//! Stands apart from `tracing`, since both are made where no event can be logged: on the log's own thread and in a panic.

use super::settings::Format;
use serde_json::{Value, json};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

/// What stands under the lines of a panic.
const PANIC_NOTE: &str =
    "costandby: internal error, the daemon ends (a restart is safe); please report the lines above";

fn now() -> String {
    let mut text = String::new();
    // Writing to a string cannot fail; a clock that cannot be read is no reason to lose the line.
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

fn json_line(level: &str, target: &str, fields: &Value) -> String {
    format!("{}\n", json!({ "timestamp": now(), "level": level, "fields": fields, "target": target }))
}

/// `count` lines are missing where this one stands.
pub(super) fn dropped(format: Format, count: u64, why: &str) -> String {
    let lines =
        if count == 1 { "1 line of this log was" } else { &format!("{count} lines of this log were") };
    let message = format!("{lines} dropped, because {why}");
    match format {
        Format::Text => format!("{}  WARN {}: {message}\n", now(), module_path!()),
        Format::Json => {
            json_line("WARN", module_path!(), &json!({ "message": message, "lines_dropped": count }))
        }
    }
}

/// A panic of `thread` at `place`.
pub(super) fn panic(
    format: Format,
    thread: &str,
    place: &str,
    message: &str,
    backtrace: Option<&str>,
) -> String {
    match format {
        Format::Text => {
            let backtrace = backtrace.map(|text| format!("\n{}", text.trim_end())).unwrap_or_default();
            format!("thread '{thread}' panicked at {place}:\n{message}{backtrace}\n{PANIC_NOTE}\n")
        }
        Format::Json => {
            let fields = json!({
                "message": format!("{PANIC_NOTE}: {message}"),
                "thread": thread,
                "place": place,
                "backtrace": backtrace,
            });
            json_line("ERROR", module_path!(), &fields)
        }
    }
}
