//! Weight matrices in the order in which the kernels read them.
//!
//! A matrix of `rows` (outputs) by `columns` (inputs) is cut into panels of 16 rows. Within a panel, two columns lie
//! together, for 16 rows side by side, so that one 64-byte load gives 16 lanes for each of two columns:
//!
//! ```text
//! panel 0:  [r0c0 r0c1][r1c0 r1c1] .. [r15c0 r15c1]   [r0c2 r0c3] ..   columns 2 and 3   ..
//! panel 1:  the same for rows 16..32; rows past the last are zero
//! ```

use rayon::prelude::*;

use super::lanes::{LANES, widen};

/// Sixteen pairs of bf16: one cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u32; LANES]);

/// A matrix of bf16, packed.
pub(crate) struct Packed {
    lines: Vec<Line>,
    rows: usize,
    columns: usize,
}

impl Packed {
    /// Packs matrices of the same number of columns, stacked on each other. Each is row-major, and has a multiple of 16
    /// rows unless it is the last. `columns` must be even.
    pub(crate) fn new(parts: &[&[u16]], columns: usize) -> Self {
        assert!(columns > 0 && columns.is_multiple_of(2), "columns come in pairs");
        let mut matrix_rows: Vec<&[u16]> = Vec::new();
        for (i, part) in parts.iter().enumerate() {
            assert!(part.len().is_multiple_of(columns), "a part is a whole number of rows");
            assert!(
                i + 1 == parts.len() || (part.len() / columns).is_multiple_of(LANES),
                "panels are not shared"
            );
            matrix_rows.extend(part.chunks_exact(columns));
        }
        let rows = matrix_rows.len();
        let pairs = columns / 2;
        let mut lines = vec![Line([0; LANES]); rows.div_ceil(LANES) * pairs];
        lines.par_chunks_mut(pairs).zip(matrix_rows.par_chunks(LANES)).for_each(|(panel, panel_rows)| {
            for (lane, row) in panel_rows.iter().enumerate() {
                for (line, pair) in panel.iter_mut().zip(row.chunks_exact(2)) {
                    line.0[lane] = u32::from(pair[0]) | u32::from(pair[1]) << 16;
                }
            }
        });
        Self { lines, rows, columns }
    }

    /// Number of outputs.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub(crate) fn columns(&self) -> usize {
        self.columns
    }

    /// Number of panels of 16 rows.
    pub(crate) fn panels(&self) -> usize {
        self.rows.div_ceil(LANES)
    }

    /// The pairs of a panel; `columns / 2 * 16` of them.
    pub(crate) fn panel(&self, panel: usize) -> *const u32 {
        let pairs = self.columns / 2;
        self.lines[panel * pairs..][..pairs].as_ptr().cast()
    }

    /// Copies one row out, as an embedding.
    pub(crate) fn row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.rows && to.len() == self.columns, "row of the matrix");
        let pairs = self.columns / 2;
        let lines = &self.lines[row / LANES * pairs..][..pairs];
        for (line, to) in lines.iter().zip(to.chunks_exact_mut(2)) {
            let pair = line.0[row % LANES];
            to[0] = widen(pair as u16);
            to[1] = widen((pair >> 16) as u16);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_out() {
        let first: Vec<u16> = (0..16 * 6).map(|i| 0x3f80 + i).collect();
        let second: Vec<u16> = (0..5 * 6).map(|i| 0x4100 + i).collect();
        let packed = Packed::new(&[&first, &second], 6);
        assert_eq!((packed.rows(), packed.panels()), (21, 2));
        let mut row = [0.0; 6];
        for (i, want) in first.chunks(6).chain(second.chunks(6)).enumerate() {
            packed.row(i, &mut row);
            assert_eq!(row.to_vec(), want.iter().map(|b| widen(*b)).collect::<Vec<_>>());
        }
    }
}
