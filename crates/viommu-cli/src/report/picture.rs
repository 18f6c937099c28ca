//! Addresses over time, in a fixed number of cells.

/// Columns: steps of time.
pub(crate) const COLUMNS: usize = 240;
/// Rows: steps of addresses.
pub(crate) const ROWS: usize = 96;

/// What happened in a cell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) maps: u32,
    pub(crate) accesses: u32,
}

impl Cell {
    fn add(&mut self, other: Self) {
        self.maps = self.maps.saturating_add(other.maps);
        self.accesses = self.accesses.saturating_add(other.accesses);
    }
}

/// One domain's addresses over time. Each row is `2^shift` bytes; rows are merged when addresses come that they do not
/// reach.
#[derive(Clone, Debug)]
pub(crate) struct Picture {
    cells: Vec<Cell>,
    /// The first address of the first row, and the bits of a row.
    base: u64,
    shift: u32,
    /// What was marked.
    low: u64,
    high: u64,
    empty: bool,
}

impl Default for Picture {
    fn default() -> Self {
        Self {
            cells: vec![Cell::default(); COLUMNS * ROWS],
            base: 0,
            shift: 12,
            low: 0,
            high: 0,
            empty: true,
        }
    }
}

impl Picture {
    pub(crate) fn base(&self) -> u64 {
        self.base
    }

    /// The last address of the last row.
    pub(crate) fn last(&self) -> u64 {
        let bytes = (ROWS as u128) << self.shift;
        u64::try_from(u128::from(self.base) + bytes - 1).unwrap_or(u64::MAX)
    }

    pub(crate) fn cell(&self, column: usize, row: usize) -> Cell {
        self.cells.get(row * COLUMNS + column).copied().unwrap_or_default()
    }

    /// A column becomes as wide as two.
    pub(crate) fn merge_columns(&mut self) {
        for row in self.cells.chunks_mut(COLUMNS) {
            for column in 0..COLUMNS {
                let mut sum = Cell::default();
                for k in [2 * column, 2 * column + 1] {
                    sum.add(row.get(k).copied().unwrap_or_default());
                }
                if let Some(cell) = row.get_mut(column) {
                    *cell = sum;
                }
            }
        }
    }

    pub(crate) fn mark(&mut self, column: usize, start: u64, last: u64, what: Cell) {
        self.reach(start);
        self.reach(last);
        for row in self.row(start)..=self.row(last) {
            if let Some(cell) = self.cells.get_mut(row * COLUMNS + column) {
                cell.add(what);
            }
        }
    }

    fn row(&self, address: u64) -> usize {
        usize::try_from(address.saturating_sub(self.base) >> self.shift).unwrap_or(ROWS).min(ROWS - 1)
    }

    fn reach(&mut self, address: u64) {
        let (low, high) =
            if self.empty { (address, address) } else { (self.low.min(address), self.high.max(address)) };
        if core::mem::take(&mut self.empty) {
            self.base = align(address, self.shift);
        }
        (self.low, self.high) = (low, high);
        if low >= self.base && high <= self.last() {
            return;
        }
        let (base, shift) = (self.base, self.shift);
        self.base = align(low, self.shift);
        while high > self.last() {
            self.shift += 1; // 58 bits reach over everything
            self.base = align(low, self.shift);
        }
        let old = core::mem::replace(&mut self.cells, vec![Cell::default(); COLUMNS * ROWS]);
        for (row, cells) in old.chunks(COLUMNS).enumerate() {
            let to = self.row(base.saturating_add((row as u64) << shift));
            for (column, cell) in cells.iter().enumerate() {
                if let Some(new) = self.cells.get_mut(to * COLUMNS + column) {
                    new.add(*cell);
                }
            }
        }
    }
}

fn align(address: u64, bits: u32) -> u64 {
    address >> bits << bits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn maps(picture: &Picture) -> u32 {
        (0..ROWS * COLUMNS).map(|k| picture.cell(k % COLUMNS, k / COLUMNS).maps).sum()
    }

    #[test]
    fn addresses_far_apart_keep_their_cells() {
        let one = Cell { maps: 1, accesses: 0 };
        let mut picture = Picture::default();
        for address in [0xffff_f000, 0xffff_e000, 0, u64::MAX, 0x8000_0000_0000_0000] {
            picture.mark(3, address, address, one);
        }
        assert_eq!(maps(&picture), 5);
        assert_eq!(picture.base(), 0);
        assert_eq!(picture.last(), u64::MAX);
        assert_eq!(picture.cell(3, 0).maps, 3);
        let middle = (0..ROWS).filter(|row| picture.cell(3, *row).maps == 1).count();
        assert_eq!(middle, 2);
    }

    #[test]
    fn merged_columns_keep_their_sums() {
        let mut picture = Picture::default();
        for column in 0..COLUMNS {
            picture.mark(column, 0x1000, 0x1fff, Cell { maps: 1, accesses: 0 });
        }
        picture.merge_columns();
        assert_eq!(maps(&picture), u32::try_from(COLUMNS).unwrap());
        assert_eq!(picture.cell(0, 0).maps, 2);
        assert_eq!(picture.cell(COLUMNS / 2, 0).maps, 0);
    }
}
