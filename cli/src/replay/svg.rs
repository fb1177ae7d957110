//! A plot of hit ratio over capacity, as SVG.

use std::fmt::Write;

use super::curve::Line;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 480.0;
/// Left, right, top, bottom.
const MARGINS: (f64, f64, f64, f64) = (60.0, 190.0, 40.0, 55.0);
/// Told apart by most who do not see all colours; repeated with dashes.
const COLOURS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933"];

struct Axes {
    /// Logarithms of the smallest and the largest capacity.
    log: (f64, f64),
    /// Largest ratio shown.
    top: f64,
}

impl Axes {
    fn of(lines: &[Line]) -> Self {
        let points = || lines.iter().flat_map(|line| &line.points);
        let sizes = || points().map(|(size, _)| f64::from((*size).max(1)).log2());
        let (low, high) = (sizes().fold(f64::INFINITY, f64::min), sizes().fold(0.0, f64::max));
        let most = points().map(|(_, ratio)| *ratio).fold(0.0, f64::max);
        // Whole tenths, one at least.
        let top = ((most * 10.0).ceil() / 10.0).clamp(0.1, 1.0);
        Self { log: if low < high { (low, high) } else { (high - 1.0, high + 1.0) }, top }
    }

    fn x(&self, size: u32) -> f64 {
        let (left, right, ..) = MARGINS;
        let share = (f64::from(size.max(1)).log2() - self.log.0) / (self.log.1 - self.log.0);
        left + share * (WIDTH - left - right)
    }

    fn y(&self, ratio: f64) -> f64 {
        let (_, _, top, bottom) = MARGINS;
        HEIGHT - bottom - ratio / self.top * (HEIGHT - top - bottom)
    }
}

/// The document. `title` may hold anything.
pub(super) fn plot(title: &str, lines: &[Line]) -> String {
    let axes = Axes::of(lines);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"white\"/>\n"
    );
    draw(&mut svg, lines, &axes, title).expect("a string takes everything");
    svg + "</svg>\n"
}

fn draw(svg: &mut String, lines: &[Line], axes: &Axes, title: &str) -> std::fmt::Result {
    let (left, right, top, bottom) = MARGINS;
    let (end, floor) = (WIDTH - right, HEIGHT - bottom);
    writeln!(svg, "<text x=\"{left}\" y=\"22\" font-size=\"14\">{}</text>", escaped(title))?;
    for tenth in 0..=(axes.top * 10.0).round() as u32 {
        let ratio = f64::from(tenth) / 10.0;
        let y = axes.y(ratio);
        writeln!(svg, "<path d=\"M{left} {y:.1}H{end}\" stroke=\"#ddd\"/>")?;
        let (x, y) = (left - 8.0, y + 4.0);
        writeln!(svg, "<text x=\"{x}\" y=\"{y:.1}\" text-anchor=\"end\">{ratio:.1}</text>")?;
    }
    let sizes = lines.first().map_or(&[][..], |line| &line.points);
    for (size, _) in sizes {
        let (x, y) = (axes.x(*size), floor + 18.0);
        writeln!(svg, "<path d=\"M{x:.1} {top}V{floor}\" stroke=\"#eee\"/>")?;
        let label = short(*size);
        writeln!(svg, "<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{label}</text>")?;
    }
    let (middle, below) = ((left + end) / 2.0, HEIGHT - 12.0);
    writeln!(svg, "<text x=\"{middle}\" y=\"{below}\" text-anchor=\"middle\">capacity, blocks</text>")?;
    for (number, line) in lines.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let dash = if number < COLOURS.len() { "" } else { " stroke-dasharray=\"5 3\"" };
        let points: Vec<String> = line
            .points
            .iter()
            .map(|(size, ratio)| format!("{:.1},{:.1}", axes.x(*size), axes.y(*ratio)))
            .collect();
        let points = points.join(" ");
        writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>"
        )?;
        let y = top + 10.0 + 20.0 * number as f64;
        let (from, to, text) = (end + 15.0, end + 40.0, end + 46.0);
        writeln!(svg, "<path d=\"M{from} {y}H{to}\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>")?;
        writeln!(svg, "<text x=\"{text}\" y=\"{}\">{}</text>", y + 4.0, escaped(line.policy))?;
    }
    Ok(())
}

/// `65536` as `64k`, if nothing is lost by it.
fn short(size: u32) -> String {
    match size {
        size if size >= 1000 && size.is_multiple_of(1000) => format!("{}k", size / 1000),
        size if size >= 1024 && size.is_multiple_of(1024) => format!("{}Ki", size / 1024),
        size => size.to_string(),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_has_a_line_for_each_policy_and_stays_on_the_sheet() {
        let line = |policy, ratios: [f64; 3]| Line {
            policy,
            points: [1000, 10_000, 64].into_iter().zip(ratios).collect(),
        };
        let svg = plot("a < b & c", &[line("lru", [0.1, 0.35, 0.0]), line("belady", [0.2, 0.36, 0.01])]);
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(
            svg.contains("a &lt; b &amp; c") && svg.contains(">10k<") && svg.contains(">belady<"),
            "{svg}"
        );
        let points =
            svg.split("points=\"").skip(1).flat_map(|rest| rest.split('"').next().unwrap().split(' '));
        for point in points {
            let (x, y) = point.split_once(',').unwrap();
            let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
            assert!((0.0..=WIDTH).contains(&x) && (0.0..=HEIGHT).contains(&y), "{point}");
        }
        // One capacity, and none.
        assert!(plot("", &[Line { policy: "lru", points: vec![(5, 0.5)] }]).contains("polyline"));
        assert!(!plot("", &[]).contains("NaN"));
    }
}
