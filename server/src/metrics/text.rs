//! The text format that Prometheus scrapes, version 0.0.4.

use std::fmt::{Display, Write};

/// A document being written.
#[derive(Debug, Default)]
pub(super) struct Text(String);

impl Text {
    /// Names the family that the next lines belong to.
    pub fn family(&mut self, name: &'static str, kind: &'static str, help: &str) -> Family<'_> {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}"));
        Family { text: self, name }
    }

    /// A family of one counter without labels.
    pub fn counter(&mut self, name: &'static str, help: &str, value: u64) {
        self.family(name, "counter", help).value(&[], value);
    }

    /// A family of one gauge without labels.
    pub fn gauge(&mut self, name: &'static str, help: &str, value: impl Display) {
        self.family(name, "gauge", help).value(&[], value);
    }

    /// The document.
    pub fn finish(self) -> String {
        self.0
    }

    fn line(&mut self, line: std::fmt::Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a string takes everything");
    }
}

/// One family.
#[derive(Debug)]
pub(super) struct Family<'a> {
    text: &'a mut Text,
    name: &'static str,
}

impl Family<'_> {
    /// One sample.
    pub fn value(&mut self, labels: &[(&str, &str)], value: impl Display) {
        let Self { text, name } = self;
        text.line(format_args!("{name}{} {value}", Labels(labels)));
    }

    /// One histogram: upper bounds (seconds) with the number of values up to each bound but above the one before,
    /// then those above all bounds.
    pub fn histogram(&mut self, labels: &[(&str, &str)], buckets: &[(f64, u64)], above: u64, sum: f64) {
        let Self { text, name } = self;
        let mut count = 0;
        for (bound, values) in buckets {
            count += values;
            let bound = bound.to_string();
            let labels = [labels, &[("le", &bound)]].concat();
            text.line(format_args!("{name}_bucket{} {count}", Labels(&labels)));
        }
        count += above;
        let all = [labels, &[("le", "+Inf")]].concat();
        text.line(format_args!("{name}_bucket{} {count}", Labels(&all)));
        text.line(format_args!("{name}_sum{} {sum}", Labels(labels)));
        text.line(format_args!("{name}_count{} {count}", Labels(labels)));
    }
}

struct Labels<'a>(&'a [(&'a str, &'a str)]);

impl Display for Labels<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (position, (name, value)) in self.0.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            write!(f, "{}{name}=\"{value}\"", if position == 0 { '{' } else { ',' })?;
        }
        if self.0.is_empty() { Ok(()) } else { f.write_char('}') }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_escaped_and_buckets_cumulate() {
        let mut text = Text::default();
        text.counter("a_total", "One\nline.", 3);
        let mut family = text.family("b_seconds", "histogram", "Time.");
        family.histogram(&[("route", "x\"y")], &[(0.001, 2), (0.1, 1)], 1, 2.5);
        assert_eq!(
            text.finish(),
            "# HELP a_total One\\nline.\n# TYPE a_total counter\na_total 3\n\
             # HELP b_seconds Time.\n# TYPE b_seconds histogram\n\
             b_seconds_bucket{route=\"x\\\"y\",le=\"0.001\"} 2\n\
             b_seconds_bucket{route=\"x\\\"y\",le=\"0.1\"} 3\n\
             b_seconds_bucket{route=\"x\\\"y\",le=\"+Inf\"} 4\n\
             b_seconds_sum{route=\"x\\\"y\"} 2.5\nb_seconds_count{route=\"x\\\"y\"} 4\n"
        );
    }
}
