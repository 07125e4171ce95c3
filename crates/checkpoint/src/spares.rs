//! Memory for copies of what a checkpoint is still being written from when training updates it.
//!
//! ```text
//! Arc::clone ──► the checkpoint's writer reads, and lets go
//! Spares::unshare, before an update: nothing, or a copy in memory that an earlier checkpoint has let go
//! ```
//! Memory that a process has written to before costs a copy of it and no more; fresh memory costs the system's zeros and a page fault
//! for every 4 KiB besides, three times as much.

use std::sync::{Arc, Mutex, PoisonError};

/// What was copied, as long as somebody holds it, and its memory from then on: as much as was copied at one time, at most.
#[derive(Debug, Default)]
pub struct Spares(Mutex<Vec<Arc<Vec<f32>>>>);

impl Spares {
    /// Copies values that others hold, so that a write to them ([`Arc::make_mut`]) need not; says whether it did.
    pub fn unshare(&self, values: &mut Arc<Vec<f32>>) -> bool {
        if Arc::get_mut(values).is_some() {
            return false;
        }
        let mut copy = self.take(values.len());
        copy.clear();
        copy.extend_from_slice(values);
        let held = std::mem::replace(values, Arc::new(copy));
        self.all().push(held);
        true
    }

    /// Memory for `len` values: some that nobody holds any more, if there is any of that length.
    fn take(&self, len: usize) -> Vec<f32> {
        let mut all = self.all();
        let free = |it: &mut Arc<Vec<f32>>| it.len() == len && Arc::get_mut(it).is_some();
        let Some(place) = all.iter_mut().position(free) else {
            return Vec::new();
        };
        Arc::try_unwrap(all.swap_remove(place)).unwrap_or_default()
    }

    fn all(&self) -> std::sync::MutexGuard<'_, Vec<Arc<Vec<f32>>>> {
        // Whole after every line.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_stays_and_a_copy_goes_where_an_earlier_one_was() {
        let spares = Spares::default();
        let mut values = Arc::new(vec![0.0; 1000]);
        let first = values.as_ptr();
        assert!(!spares.unshare(&mut values), "nobody holds them");
        let held = Arc::clone(&values);
        assert!(spares.unshare(&mut values));
        Arc::make_mut(&mut values)[7] = 1.0;
        let second = values.as_ptr();
        assert_ne!(second, first);
        assert!(held.iter().all(|value| *value == 0.0));
        // As long as it is held its memory is not taken.
        let other = Arc::clone(&values);
        assert!(spares.unshare(&mut values));
        Arc::make_mut(&mut values)[7] = 2.0;
        let third = values.as_ptr();
        assert!(third != first && third != second);
        assert_eq!((held[7], other[7], values[7]), (0.0, 1.0, 2.0));
        drop((held, other));
        // Others of that length may have it, too; those of another do not fit.
        let mut others = [Arc::new(vec![5.0; 1000]), Arc::new(vec![6.0; 999])];
        let held = others.clone();
        assert!(others.iter_mut().all(|it| spares.unshare(it)));
        assert!([first, second].contains(&others[0].as_ptr()));
        assert!(![first, second].contains(&others[1].as_ptr()));
        assert_eq!(others, held);
        let held = Arc::clone(&values);
        assert!(spares.unshare(&mut values));
        assert!([first, second].contains(&values.as_ptr()));
        assert_eq!(values, held);
    }
}
