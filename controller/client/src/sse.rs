//! Server-sent events, taken apart as the bytes come. No IO in here.

use std::collections::VecDeque;

/// Longest line, and longest data of one event, in bytes.
const EVENT_BYTES_MAX: usize = 64 * 1024;

/// One event.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Event {
    /// The event id in force, if any was given.
    pub(crate) id: Option<String>,
    /// The data lines, joined by newlines.
    pub(crate) data: String,
}

/// The stream breaks a rule of this client.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SseError {
    #[error("an event is longer than {EVENT_BYTES_MAX} bytes")]
    TooLong,
    #[error("an event is not UTF-8")]
    NotUtf8,
}

/// Takes bytes in, gives events out. An event that the stream's end cuts off is dropped, as the standard has it.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    line: Vec<u8>,
    /// The last byte was a CR: a LF that follows belongs to it.
    after_cr: bool,
    id: Option<String>,
    data: Option<String>,
    ready: VecDeque<Event>,
}

impl Parser {
    /// Takes in the next bytes.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), SseError> {
        for &byte in bytes {
            let lf_of_crlf = self.after_cr && byte == b'\n';
            self.after_cr = byte == b'\r';
            match byte {
                b'\n' if lf_of_crlf => {}
                b'\n' | b'\r' => self.end_line()?,
                _ if self.line.len() == EVENT_BYTES_MAX => return Err(SseError::TooLong),
                _ => self.line.push(byte),
            }
        }
        Ok(())
    }

    /// The next complete event.
    pub(crate) fn next(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }

    fn end_line(&mut self) -> Result<(), SseError> {
        let line = String::from_utf8(std::mem::take(&mut self.line)).map_err(|_| SseError::NotUtf8)?;
        if line.is_empty() {
            if let Some(data) = self.data.take() {
                self.ready.push_back(Event { id: self.id.clone(), data });
            }
            return Ok(());
        }
        let (field, value) = line.split_once(':').unwrap_or((&line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" if !value.contains('\0') => self.id = Some(value.to_owned()),
            "data" => match &mut self.data {
                Some(data) if data.len() + value.len() >= EVENT_BYTES_MAX => return Err(SseError::TooLong),
                Some(data) => {
                    data.push('\n');
                    data.push_str(value);
                }
                None => self.data = Some(value.to_owned()),
            },
            // Comments have an empty field name; `event` and `retry` mean nothing to this client.
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(chunks: &[&str]) -> Vec<(Option<String>, String)> {
        let mut parser = Parser::default();
        for chunk in chunks {
            parser.push(chunk.as_bytes()).unwrap();
        }
        std::iter::from_fn(|| parser.next()).map(|e| (e.id, e.data)).collect()
    }

    #[test]
    fn events_come_whole_however_the_bytes_are_cut() {
        let text = ": hello\r\n\r\nid: ready\r\nevent: x\r\ndata: {\"a\":\r\ndata: 1}\r\n\r\ndata:two\n\n";
        let expected =
            vec![(Some("ready".into()), "{\"a\":\n1}".into()), (Some("ready".into()), "two".to_owned())];
        assert_eq!(events(&[text]), expected);
        let single: Vec<String> = text.chars().map(String::from).collect();
        assert_eq!(events(&single.iter().map(String::as_str).collect::<Vec<_>>()), expected);
    }

    #[test]
    fn a_cut_off_event_is_dropped_and_a_bare_cr_ends_a_line() {
        assert_eq!(events(&["data: a\r\rdata: b\n"]), [(None, "a".to_owned())]);
    }

    #[test]
    fn endless_lines_and_events_are_refused() {
        let mut parser = Parser::default();
        assert_eq!(parser.push(&vec![b'x'; EVENT_BYTES_MAX + 1]), Err(SseError::TooLong));
        let mut parser = Parser::default();
        let line = format!("data: {}\n", "x".repeat(EVENT_BYTES_MAX / 2));
        assert_eq!(parser.push(line.as_bytes()), Ok(()));
        assert_eq!(parser.push(line.as_bytes()), Err(SseError::TooLong));
        assert_eq!(Parser::default().push(b"data: \xff\n"), Err(SseError::NotUtf8));
    }
}
