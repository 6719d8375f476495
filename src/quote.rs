//! Others' words in our messages.

/// Cuts text of others to what a log line can bear.
pub(crate) fn shorten(text: &str) -> String {
    const SHOWN: usize = 200;
    let mut short: String =
        text.trim().chars().take(SHOWN).map(|c| if c.is_control() { ' ' } else { c }).collect();
    if text.trim().chars().count() > SHOWN {
        short.push('…');
    }
    short
}
