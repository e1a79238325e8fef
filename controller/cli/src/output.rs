//! What goes to stdout: tables and fields for people, or JSON.

use crate::error::CliError;
use comfy_table::{CellAlignment, ContentArrangement, presets};
use serde::Serialize;
use std::io::Write;

/// Where a command's results go.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Out {
    /// Whether to print JSON.
    pub(crate) json: bool,
}

impl Out {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Raw bytes.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Result<(), CliError> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(|error| CliError::io("writing", error))
    }

    /// Text, with a newline at its end.
    pub(crate) fn text(&self, text: &str) -> Result<(), CliError> {
        self.bytes(format!("{text}\n").as_bytes())
    }

    /// A JSON document.
    pub(crate) fn json(&self, value: &impl Serialize) -> Result<(), CliError> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| CliError::Failed(format!("can't be written as JSON: {error}")))?;
        self.text(&text)
    }

    /// A remark beside the result; never on stdout.
    pub(crate) fn note(&self, text: &str) {
        // Where stderr is closed there is nobody to tell.
        let _ = writeln!(std::io::stderr(), "{text}");
    }
}

/// A column of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Column {
    /// Words.
    Left(&'static str),
    /// Numbers and durations.
    Right(&'static str),
    /// Words; the column is left out if it is empty in all rows.
    Maybe(&'static str),
}

/// Renders rows under a header. Every row has as many cells as there are columns.
pub(crate) fn table(columns: &[Column], rows: &[Vec<String>]) -> String {
    let shown: Vec<usize> = (0..columns.len())
        .filter(|&i| {
            !matches!(columns.get(i), Some(Column::Maybe(_)))
                || rows.iter().any(|row| row.get(i).is_some_and(|cell| !cell.is_empty()))
        })
        .collect();
    let mut table = comfy_table::Table::new();
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(shown.iter().filter_map(|&i| columns.get(i)).map(|column| match column {
        Column::Left(title) | Column::Right(title) | Column::Maybe(title) => *title,
    }));
    for row in rows {
        table.add_row(shown.iter().filter_map(|&i| row.get(i)));
    }
    for (position, &i) in shown.iter().enumerate() {
        if let Some(column) = table.column_mut(position) {
            column.set_padding((0, 2));
            if matches!(columns.get(i), Some(Column::Right(_))) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.trim_fmt()
}

/// Renders names and values below one another; empty values are left out.
pub(crate) fn fields(fields: &[(&str, String)]) -> String {
    let shown = || fields.iter().filter(|(_, value)| !value.is_empty());
    let width = shown().map(|(name, _)| name.len()).max().unwrap_or(0);
    shown().map(|(name, value)| format!("{name:width$}  {value}")).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_to_the_right_and_empty_columns_go() {
        let columns = [Column::Left("NAME"), Column::Maybe("TAG"), Column::Right("TOKEN")];
        let rows = [
            vec!["a".to_owned(), String::new(), "7".to_owned()],
            vec!["long-name".to_owned(), String::new(), "12345678".to_owned()],
        ];
        assert_eq!(table(&columns, &rows), "NAME          TOKEN\na                 7\nlong-name  12345678");
        let tagged = [vec!["ü".to_owned(), "t".to_owned(), "7".to_owned()]];
        assert_eq!(table(&columns, &tagged), "NAME  TAG  TOKEN\nü     t        7");
    }

    #[test]
    fn fields_are_aligned_and_empty_ones_go() {
        let rows = [("key", "k".to_owned()), ("tag", String::new()), ("fencing token", "7".to_owned())];
        assert_eq!(fields(&rows), "key            k\nfencing token  7");
    }
}
