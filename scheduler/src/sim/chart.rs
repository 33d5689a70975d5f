//! Charts as SVG, written by hand: lines, dots, stacked bars, areas and bars in panels. Colours are Okabe and Ito's, which colour-blind
//! readers can tell apart; lines differ by dashes and marks as well, and every chart has a title and a description for screen readers.

use std::fmt::Write;

/// Okabe and Ito's palette without yellow and black.
pub const COLOURS: [&str; 7] = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#666666"];
const DASHES: [&str; 7] = ["", "7 3", "2 3", "9 3 2 3", "", "7 3", "2 3"];
/// Width of every chart.
const WIDTH: f64 = 760.0;
const INK: &str = "#222222";
const FAINT: &str = "#dddddd";

/// A file's name, without ending, and the chart.
pub type Chart = (String, String);

/// A chart being written.
struct Svg {
    body: String,
    height: f64,
    title: String,
    about: String,
}

impl Svg {
    fn new(title: &str, about: &str) -> Svg {
        let mut svg = Svg { body: String::new(), height: 0.0, title: title.into(), about: about.into() };
        svg.text(20.0, 28.0, title, Text { size: 16, bold: true, ..Text::default() });
        svg.text(20.0, 47.0, about, Text { colour: "#555555", ..Text::default() });
        svg
    }

    fn text(&mut self, x: f64, y: f64, text: &str, how: Text) {
        let weight = if how.bold { " font-weight=\"600\"" } else { "" };
        let turn = if how.upright { format!(" transform=\"rotate(-90 {x:.1} {y:.1})\"") } else { String::new() };
        let (size, colour, anchor) = (how.size, how.colour, how.anchor);
        let _ = writeln!(
            self.body,
            "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" fill=\"{colour}\" text-anchor=\"{anchor}\"{weight}{turn}>{}</text>",
            escape(text)
        );
    }

    fn line(&mut self, from: (f64, f64), to: (f64, f64), colour: &str, dash: &str) {
        let _ = writeln!(
            self.body,
            "<line x1=\"{:.1}\" y1=\"{:.1}\" x2=\"{:.1}\" y2=\"{:.1}\" stroke=\"{colour}\" stroke-dasharray=\"{dash}\"/>",
            from.0, from.1, to.0, to.1
        );
    }

    fn rect(&mut self, x: f64, y: f64, width: f64, height: f64, colour: &str) {
        let width = width.max(0.0);
        let _ = writeln!(
            self.body,
            "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\"/>"
        );
    }

    fn path(&mut self, points: &[(f64, f64)], stroke: Option<(&str, &str)>, fill: &str) {
        let mut d = String::new();
        for (at, (x, y)) in points.iter().enumerate() {
            let _ = write!(d, "{}{x:.1} {y:.1}", if at == 0 { "M" } else { "L" });
        }
        let stroke = match stroke {
            Some((colour, dash)) => format!("stroke=\"{colour}\" stroke-width=\"2\" stroke-dasharray=\"{dash}\""),
            None => String::new(),
        };
        let _ = writeln!(self.body, "<path d=\"{d}\" fill=\"{fill}\" {stroke}/>");
    }

    /// A mark; its shape goes by number.
    fn mark(&mut self, (x, y): (f64, f64), which: usize, colour: &str) {
        let r = 4.0;
        let corners: &[(f64, f64)] = match which % 4 {
            0 => {
                let _ = writeln!(self.body, "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r}\" fill=\"{colour}\"/>");
                return;
            }
            1 => &[(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)],
            2 => &[(0.0, -1.3), (1.2, 1.0), (-1.2, 1.0)],
            _ => &[(0.0, -1.4), (1.4, 0.0), (0.0, 1.4), (-1.4, 0.0)],
        };
        let points: Vec<String> =
            corners.iter().map(|(dx, dy)| format!("{:.1},{:.1}", x + dx * r, y + dy * r)).collect();
        let _ = writeln!(self.body, "<polygon points=\"{}\" fill=\"{colour}\"/>", points.join(" "));
    }

    fn finish(self) -> String {
        let (height, title, about) = (self.height, escape(&self.title), escape(&self.about));
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" role=\"img\" aria-labelledby=\"title about\" \
             font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif\">\n\
             <title id=\"title\">{title}</title>\n<desc id=\"about\">{about}</desc>\n\
             <rect width=\"{WIDTH}\" height=\"{height:.0}\" fill=\"#ffffff\"/>\n{}</svg>\n",
            self.body
        )
    }
}

#[derive(Clone, Copy)]
struct Text {
    size: u32,
    colour: &'static str,
    anchor: &'static str,
    bold: bool,
    upright: bool,
}

impl Default for Text {
    fn default() -> Text {
        Text { size: 12, colour: INK, anchor: "start", bold: false, upright: false }
    }
}

const END: Text = Text { size: 12, colour: INK, anchor: "end", bold: false, upright: false };
const MIDDLE: Text = Text { size: 12, colour: INK, anchor: "middle", bold: false, upright: false };

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// A number with as many digits as it is worth.
fn number(value: f64) -> String {
    let text = match value.abs() {
        v if v >= 1000.0 => return grouped(value),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    };
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_owned() } else { text }
}

/// Whole, with a space between thousands.
fn grouped(value: f64) -> String {
    let digits = format!("{:.0}", value.abs());
    let mut text = if value < 0.0 { "-".to_owned() } else { String::new() };
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// An axis.
#[derive(Debug, Clone)]
pub struct Axis {
    /// What it is, with its unit.
    pub label: String,
    /// Logarithmic.
    pub log: bool,
}

impl Axis {
    /// With equal steps.
    pub fn linear(label: &str) -> Axis {
        Axis { label: label.into(), log: false }
    }

    /// With equal factors; what is not above 0 has no place on it.
    pub fn log(label: &str) -> Axis {
        Axis { label: label.into(), log: true }
    }
}

/// Values to places.
struct Scale {
    log: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn new(axis: &Axis, values: impl Iterator<Item = f64>, (from, to): (f64, f64)) -> Scale {
        let usable = values.filter(|value| value.is_finite() && (!axis.log || *value > 0.0));
        let (mut low, mut high) = usable.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if low > high {
            (low, high) = if axis.log { (0.1, 1.0) } else { (0.0, 1.0) };
        }
        if axis.log {
            (low, high) = (10f64.powf(low.log10().floor()), 10f64.powf((high.log10() - 1e-9).ceil()));
        } else {
            low = low.min(0.0);
            let step = step(high - low);
            high = ((high / step).ceil() * step).max(low + step);
        }
        Scale { log: axis.log, low, high, from, to }
    }

    fn place(&self, value: f64) -> f64 {
        let share = match self.log {
            true => (value.max(self.low) / self.low).ln() / (self.high / self.low).ln(),
            false => (value - self.low) / (self.high - self.low),
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let (from, to) = (self.low.log10().round() as i32, self.high.log10().round() as i32);
            return (from..=to).map(|power| 10f64.powi(power)).collect();
        }
        let step = step(self.high - self.low);
        let count = ((self.high - self.low) / step + 0.5) as i32;
        (0..=count).map(|at| self.low + f64::from(at) * step).collect()
    }
}

/// 1, 2 or 5 times a power of ten: four to nine steps to the range.
fn step(range: f64) -> f64 {
    let rough = (range / 5.0).max(1e-9);
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter().find(|factor| factor * power >= rough * 0.999).unwrap_or(10.0);
    factor * power
}

/// Named points.
pub type Series = (String, Vec<(f64, f64)>);

/// Lines with marks.
pub fn lines(title: &str, about: &str, x: &Axis, y: &Axis, all: &[Series]) -> String {
    let mut svg = Svg::new(title, about);
    let (left, right, top, bottom) = (70.0, WIDTH - 180.0, 66.0, 330.0);
    svg.height = 385.0;
    let points = || all.iter().flat_map(|(_, points)| points);
    let across = Scale::new(x, points().map(|point| point.0), (left, right));
    let up = Scale::new(y, points().map(|point| point.1), (bottom, top));
    for tick in up.ticks() {
        let at = up.place(tick);
        svg.line((left, at), (right, at), FAINT, "");
        svg.text(left - 8.0, at + 4.0, &number(tick), END);
    }
    for tick in across.ticks() {
        let at = across.place(tick);
        svg.line((at, bottom), (at, bottom + 5.0), INK, "");
        svg.text(at, bottom + 20.0, &number(tick), MIDDLE);
    }
    svg.line((left, bottom), (right, bottom), INK, "");
    svg.text((left + right) / 2.0, bottom + 42.0, &x.label, MIDDLE);
    svg.text(20.0, (top + bottom) / 2.0, &y.label, Text { upright: true, ..MIDDLE });
    for (at, (name, points)) in all.iter().enumerate() {
        let (colour, dash) = (COLOURS[at % COLOURS.len()], DASHES[at % DASHES.len()]);
        let usable = points.iter().filter(|(_, value)| !y.log || *value > 0.0);
        let places: Vec<(f64, f64)> = usable.map(|(a, b)| (across.place(*a), up.place(*b))).collect();
        svg.path(&places, Some((colour, dash)), "none");
        for place in places {
            svg.mark(place, at, colour);
        }
        let row = top + 8.0 + 22.0 * at as f64;
        svg.path(&[(right + 16.0, row), (right + 46.0, row)], Some((colour, dash)), "none");
        svg.mark((right + 31.0, row), at, colour);
        svg.text(right + 54.0, row + 4.0, name, Text::default());
    }
    svg.finish()
}

fn legend(svg: &mut Svg, y: f64, names: &[(&str, &str)], marks: bool) {
    let mut x = 20.0;
    for (at, (name, colour)) in names.iter().enumerate() {
        if marks {
            svg.mark((x + 6.0, y - 4.0), at, colour);
        } else {
            svg.rect(x, y - 10.0, 12.0, 12.0, colour);
        }
        svg.text(x + 18.0, y, name, Text::default());
        x += 34.0 + 6.8 * name.len() as f64;
    }
}

/// Width that row names get.
const NAMES: f64 = 150.0;

/// Rows of shares that add up to 1.
pub fn stacked(title: &str, about: &str, parts: &[(&str, &str)], rows: &[(String, Vec<f64>)]) -> String {
    let mut svg = Svg::new(title, about);
    legend(&mut svg, 74.0, parts, false);
    let (left, right, top) = (NAMES, WIDTH - 30.0, 90.0);
    for (at, (name, shares)) in rows.iter().enumerate() {
        let y = top + 28.0 * at as f64;
        svg.text(left - 8.0, y + 15.0, name, END);
        let mut x = left;
        for (share, (_, colour)) in shares.iter().zip(parts) {
            let width = share * (right - left);
            svg.rect(x, y, width, 21.0, colour);
            if *share >= 0.05 {
                // White on orange is hard to read.
                let ink = if [FREE, COLOURS[5]].contains(colour) { INK } else { "#ffffff" };
                let percent = format!("{:.0} %", share * 100.0);
                svg.text(x + width / 2.0, y + 15.0, &percent, Text { colour: ink, ..MIDDLE });
            }
            x += width;
        }
    }
    let bottom = top + 28.0 * rows.len() as f64;
    for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
        svg.text(left + tick * (right - left), bottom + 14.0, &format!("{:.0} %", tick * 100.0), MIDDLE);
    }
    svg.height = bottom + 28.0;
    svg.finish()
}

/// The colour of what is nobody's.
pub const FREE: &str = "#e4e4e4";

/// Rows of marks, joined.
pub fn dots(title: &str, about: &str, x: &Axis, names: &[&str], rows: &[(String, Vec<f64>)]) -> String {
    let mut svg = Svg::new(title, about);
    let colours: Vec<(&str, &str)> = names.iter().zip(COLOURS).map(|(name, colour)| (*name, colour)).collect();
    legend(&mut svg, 74.0, &colours, true);
    let (left, right, top) = (NAMES, WIDTH - 40.0, 92.0);
    let bottom = top + 26.0 * rows.len() as f64;
    let across = Scale::new(x, rows.iter().flat_map(|(_, values)| values.iter().copied()), (left, right));
    for tick in across.ticks() {
        let at = across.place(tick);
        svg.line((at, top - 6.0), (at, bottom), FAINT, "");
        svg.text(at, bottom + 16.0, &number(tick), MIDDLE);
    }
    for (at, (name, values)) in rows.iter().enumerate() {
        let y = top + 8.0 + 26.0 * at as f64;
        svg.text(left - 12.0, y + 4.0, name, END);
        let places: Vec<f64> = values.iter().map(|value| across.place(*value)).collect();
        let (low, high) = places.iter().fold((right, left), |(l, h), p| (l.min(*p), h.max(*p)));
        svg.line((low, y), (high, y), "#888888", "");
        for (which, place) in places.into_iter().enumerate() {
            svg.mark((place, y), which, COLOURS[which % COLOURS.len()]);
        }
    }
    svg.text((left + right) / 2.0, bottom + 38.0, &x.label, MIDDLE);
    svg.height = bottom + 54.0;
    svg.finish()
}

/// A panel's name, and two shares by time.
pub type Panel = (String, Vec<(f64, [f64; 2])>);

/// Two shares over time, one on the other, in a panel each.
pub fn areas(title: &str, about: &str, x: &str, names: [&str; 2], panels: &[Panel]) -> String {
    let mut svg = Svg::new(title, about);
    let colours = [COLOURS[0], COLOURS[5]];
    legend(&mut svg, 74.0, &[(names[0], colours[0]), (names[1], colours[1]), ("free", FREE)], false);
    let (wide, high, gap) = (332.0, 64.0, 44.0);
    for (at, (name, points)) in panels.iter().enumerate() {
        let (left, top) = (50.0 + (wide + 28.0) * (at % 2) as f64, 112.0 + (high + gap) * (at / 2) as f64);
        svg.text(left, top - 7.0, name, Text { bold: true, ..Text::default() });
        svg.rect(left, top, wide, high, FREE);
        let last = points.last().map_or(1.0, |point| point.0 * (1.0 + 0.5 / points.len() as f64));
        let across = |time: f64| left + time / last * wide;
        let up = |share: f64| top + high * (1.0 - share.clamp(0.0, 1.0));
        let area = |of: &dyn Fn(&[f64; 2]) -> f64| {
            let mut outline = vec![(left, top + high)];
            if let Some((_, first)) = points.first() {
                outline.push((left, up(of(first))));
            }
            outline.extend(points.iter().map(|(time, shares)| (across(*time), up(of(shares)))));
            if let Some((_, end)) = points.last() {
                outline.push((left + wide, up(of(end))));
            }
            outline.push((left + wide, top + high));
            outline
        };
        svg.path(&area(&|shares| shares[0] + shares[1]), None, colours[1]);
        svg.path(&area(&|shares| shares[0]), None, colours[0]);
        for (share, label) in [(0.0, "0"), (0.5, "50 %"), (1.0, "100 %")] {
            if at % 2 == 0 {
                svg.text(left - 6.0, up(share) + 4.0, label, Text { size: 10, ..END });
            }
        }
        let scale = Scale { log: false, low: 0.0, high: last, from: left, to: left + wide };
        for tick in scale.ticks().into_iter().filter(|tick| *tick <= last) {
            svg.line((across(tick), top + high), (across(tick), top + high + 4.0), INK, "");
            svg.text(across(tick), top + high + 15.0, &number(tick), Text { size: 10, ..MIDDLE });
        }
    }
    let bottom = 112.0 + (high + gap) * panels.len().div_ceil(2) as f64;
    svg.text(WIDTH / 2.0, bottom - 8.0, x, MIDDLE);
    svg.height = bottom + 8.0;
    svg.finish()
}

/// A panel of bars: its title, the greatest value of its axis if that is given, and how a value is written.
pub struct Bars {
    /// What it shows, with its unit.
    pub title: String,
    /// Where its axis ends; by the values if not given.
    pub end: Option<f64>,
    /// By row.
    pub rows: Vec<(String, f64)>,
}

/// Panels of bars beside each other, with the same rows; a value that is not a number has no bar.
pub fn bars(title: &str, about: &str, panels: &[Bars]) -> String {
    let mut svg = Svg::new(title, about);
    let rows = panels.first().map_or(0, |panel| panel.rows.len());
    let wide = (WIDTH - NAMES - 20.0) / panels.len().max(1) as f64;
    let top = 92.0;
    for (at, panel) in panels.iter().enumerate() {
        let left = NAMES + wide * at as f64;
        svg.text(left, top - 12.0, &panel.title, Text { bold: true, ..Text::default() });
        let greatest = panel.rows.iter().map(|(_, value)| *value).filter(|value| value.is_finite()).fold(0.0, f64::max);
        let end = panel.end.unwrap_or(greatest).max(1e-9);
        for (row, (name, value)) in panel.rows.iter().enumerate() {
            let y = top + 26.0 * row as f64;
            if at == 0 {
                svg.text(left - 8.0, y + 13.0, name, END);
            }
            let room = wide - 56.0;
            svg.rect(left, y, room, 18.0, "#f2f2f2");
            if value.is_finite() {
                let length = (value / end).clamp(0.0, 1.0) * room;
                svg.rect(left, y, length, 18.0, COLOURS[0]);
                svg.text(left + length + 5.0, y + 13.0, &number(*value), Text::default());
            } else {
                svg.text(left + 5.0, y + 13.0, "not reached", Text { colour: "#555555", ..Text::default() });
            }
        }
    }
    svg.height = top + 26.0 * rows as f64 + 16.0;
    svg.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let all = [
            (0.0, "0"),
            (0.1, "0.1"),
            (2.5, "2.5"),
            (33.333, "33.3"),
            (1234.5, "1 234"),
            (-1e7, "-10 000 000"),
            (0.0004, "0"),
        ];
        for (value, text) in all {
            assert_eq!(number(value), text);
        }
    }

    #[test]
    fn scales_end_at_round_numbers() {
        let linear = Scale::new(&Axis::linear("x"), [3.0, 87.0].into_iter(), (0.0, 100.0));
        assert_eq!((linear.ticks(), linear.place(100.0)), (vec![0.0, 20.0, 40.0, 60.0, 80.0, 100.0], 100.0));
        let log = Scale::new(&Axis::log("x"), [0.0, 0.2, 30.0].into_iter(), (0.0, 3.0));
        assert_eq!((log.ticks().len(), log.place(1.0)), (4, 1.0));
        let none = Scale::new(&Axis::log("x"), std::iter::empty(), (0.0, 1.0));
        assert!(none.place(0.0).is_finite());
    }

    #[test]
    fn what_comes_from_outside_is_escaped() {
        let chart =
            lines("a < b", "\"c\" & d", &Axis::linear("<x>"), &Axis::log("y"), &[("s>".into(), vec![(1.0, 2.0)])]);
        assert!(
            chart.contains("<title id=\"title\">a &lt; b</title>") && chart.contains("&quot;c&quot; &amp; d"),
            "{chart}"
        );
        assert!(!chart.contains("<x>") && chart.contains("s&gt;"));
    }
}
