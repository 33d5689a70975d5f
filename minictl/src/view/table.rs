//! Tables: columns as wide as their widest cell, three blanks between them, nothing after the last.

use super::text;

/// A header and rows.
#[derive(Debug, Clone, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
    widths: Vec<usize>,
}

impl Table {
    /// A table without rows.
    #[must_use]
    pub fn new(header: &[&str]) -> Table {
        let header: Vec<String> = header.iter().map(|&title| title.to_owned()).collect();
        let widths = header.iter().map(|title| title.chars().count()).collect();
        Table { header, rows: Vec::new(), widths }
    }

    /// Adds a row. Control characters in it are made visible.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        let row: Vec<String> = cells.into_iter().map(|cell| text::line(&cell).into_owned()).collect();
        for (width, cell) in self.widths.iter_mut().zip(&row) {
            *width = (*width).max(cell.chars().count());
        }
        self.rows.push(row);
    }

    /// Whether it has no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The header's line.
    #[must_use]
    pub fn header(&self) -> String {
        self.line(&self.header)
    }

    /// Takes the rows out as lines; the widths stay, so that rows that come later stand below them.
    pub fn take_rows(&mut self) -> Vec<String> {
        let rows = std::mem::take(&mut self.rows);
        rows.iter().map(|row| self.line(row)).collect()
    }

    /// Everything, each line with its end.
    #[must_use]
    pub fn render(&self, with_header: bool) -> String {
        let lines = with_header.then_some(&self.header).into_iter().chain(&self.rows);
        lines.map(|row| self.line(row) + "\n").collect()
    }

    fn line(&self, cells: &[String]) -> String {
        let mut line = String::new();
        for (index, (cell, width)) in cells.iter().zip(&self.widths).enumerate() {
            line.push_str(cell);
            if index + 1 < cells.len() {
                let padding = width.saturating_sub(cell.chars().count()) + 3;
                line.extend(std::iter::repeat_n(' ', padding));
            }
        }
        line.truncate(line.trim_end().len());
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "S"]);
        table.row(["a".into(), "Running".into()]);
        table.row(["longer\u{1b}[1m".into(), String::new()]);
        assert_eq!(table.render(true), "NAME              S\na                 Running\nlonger\\u{1b}[1m\n");
        assert_eq!(table.take_rows().len(), 2);
        table.row(["b".into(), "x".into()]);
        assert_eq!(table.render(false), "b                 x\n");
    }
}
