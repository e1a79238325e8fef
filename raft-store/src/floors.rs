//! Up to where each table of the database is known to be empty.
//!
//! A time index is a queue: rows go at its beginning and come at its end. RocksDB keeps a marker for each row that is gone
//! until compaction meets it, and whoever looks for the first row walks over all of them: after a minute of full load a
//! hundred thousand for every look, and more than half of all CPU time. So whoever has looked remembers what it found first, and
//! the next one begins there.
//!
//! ```text
//!    table │ x x x x x x x x r r r r    x gone, r a row
//!                            ▲ floor: no row below
//! ```
//!
//! Invariant: a floor that [`Floors::read`] gives, and that is still the same [`Reading`] after a snapshot of the database
//! was taken, hides no row of that snapshot. A write lowers the floors to what it brings *before* it happens, and changes
//! the generation before and after: nobody raises a floor by what was seen before or during a write.

use holdfast_core::kv::Table;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct Known {
    /// Odd while something is being written.
    generation: u64,
    floors: [Vec<u8>; Table::ALL.len()],
}

/// See the module.
#[derive(Debug, Default)]
pub struct Floors(Mutex<Known>);

/// A floor, and as of when.
#[derive(Debug)]
pub struct Reading {
    table: Table,
    generation: u64,
    floor: Vec<u8>,
}

impl Reading {
    /// No row of the table is below.
    pub fn floor(&self) -> &[u8] {
        &self.floor
    }
}

/// A write under way. Dropping it ends it; forgetting it leaves the floors where they are for ever, which is slow and right.
#[derive(Debug)]
pub struct Writing<'a>(&'a Floors);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.known().generation += 1;
    }
}

impl Floors {
    fn known(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The floor of a table. Take the snapshot after this, and use the floor only if [`Self::still_holds`] after that.
    pub fn read(&self, table: Table) -> Reading {
        let known = self.known();
        Reading { table, generation: known.generation, floor: known.floors[table as usize].clone() }
    }

    /// Whether nothing began or ended to be written since.
    pub fn still_holds(&self, reading: &Reading) -> bool {
        self.known().generation == reading.generation
    }

    /// A snapshot that was taken while `reading` held has no row between its floor and `first`.
    pub fn raise(&self, reading: &Reading, first: &[u8]) {
        let mut known = self.known();
        let is_writing = reading.generation % 2 == 1;
        let floor = &known.floors[reading.table as usize];
        if !is_writing && known.generation == reading.generation && first > floor.as_slice() {
            known.floors[reading.table as usize] = first.to_vec();
        }
    }

    /// Begins to write. `rows` are those that it brings; the first of each table is enough. Writes must not overlap.
    pub fn write<'a>(&self, rows: impl IntoIterator<Item = (Table, &'a [u8])>) -> Writing<'_> {
        let mut known = self.known();
        assert!(known.generation.is_multiple_of(2), "two writes to the state at once");
        known.generation += 1;
        for (table, key) in rows {
            let floor = &mut known.floors[table as usize];
            if key < floor.as_slice() {
                *floor = key.to_vec();
            }
        }
        drop(known);
        Writing(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: Table = Table::Terminated;

    fn floor(floors: &Floors) -> Vec<u8> {
        floors.read(T).floor().to_vec()
    }

    #[test]
    fn a_floor_rises_to_what_was_found_first_and_falls_to_what_is_written() {
        let floors = Floors::default();
        assert_eq!(floor(&floors), b"");
        floors.raise(&floors.read(T), b"m");
        assert_eq!(floor(&floors), b"m");
        floors.raise(&floors.read(T), b"c");
        assert_eq!(floor(&floors), b"m", "an older look knows less");
        drop(floors.write([(T, b"p".as_slice()), (Table::Keys, b"a")]));
        assert_eq!(floor(&floors), b"m");
        drop(floors.write([(T, b"p".as_slice()), (T, b"d")]));
        assert_eq!(floor(&floors), b"d");
        assert_eq!(floors.read(Table::Keys).floor(), b"");
    }

    #[test]
    fn nothing_is_concluded_from_a_look_before_or_during_a_write() {
        let floors = Floors::default();
        let before = floors.read(T);
        assert!(floors.still_holds(&before));
        let writing = floors.write([(T, b"d".as_slice())]);
        assert!(!floors.still_holds(&before));
        let during = floors.read(T);
        assert!(floors.still_holds(&during), "its floor is low enough with and without the write");
        floors.raise(&before, b"m");
        floors.raise(&during, b"m");
        drop(writing);
        floors.raise(&before, b"m");
        floors.raise(&during, b"m");
        assert!(!floors.still_holds(&during));
        assert_eq!(floor(&floors), b"");
        floors.raise(&floors.read(T), b"m");
        assert_eq!(floor(&floors), b"m");
    }

    #[test]
    #[should_panic(expected = "two writes")]
    fn writes_do_not_overlap() {
        let floors = Floors::default();
        let _one = floors.write([]);
        let _other = floors.write([]);
    }
}
