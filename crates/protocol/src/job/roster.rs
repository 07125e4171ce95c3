//! Workers in one role, by incarnation, and whose deadlines may have moved since they were last looked at.

use std::collections::BTreeMap;
use std::ops::Deref;

use super::phase::Member;
use crate::Incarnation;

/// Members, or spares. It is read as the map that it is; whoever is changed is remembered.
#[derive(Default)]
pub(super) struct Roster {
    workers: BTreeMap<Incarnation, Member>,
    touched: Touched,
}

/// Whose deadlines may have moved.
pub(super) enum Touched {
    /// Theirs. May hold some twice.
    Some(Vec<Incarnation>),
    /// Anybody's.
    All,
}

impl Default for Touched {
    fn default() -> Self {
        Self::Some(Vec::new())
    }
}

impl Deref for Roster {
    type Target = BTreeMap<Incarnation, Member>;

    fn deref(&self) -> &Self::Target {
        &self.workers
    }
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "called as the map's own methods are"
)]
impl Roster {
    pub(super) fn get_mut(&mut self, incarnation: &Incarnation) -> Option<&mut Member> {
        self.touch(*incarnation);
        self.workers.get_mut(incarnation)
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut Member> {
        self.touched = Touched::All;
        self.workers.values_mut()
    }

    pub(super) fn insert(&mut self, incarnation: Incarnation, member: Member) {
        self.touch(incarnation);
        self.workers.insert(incarnation, member);
    }

    pub(super) fn remove(&mut self, incarnation: &Incarnation) -> Option<Member> {
        self.touch(*incarnation);
        self.workers.remove(incarnation)
    }

    /// Takes everybody out.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = Incarnation> {
        self.touched = Touched::All;
        std::mem::take(&mut self.workers).into_keys()
    }

    /// Something outside of here changed a worker's deadlines.
    pub(super) fn touch(&mut self, incarnation: Incarnation) {
        if let Touched::Some(touched) = &mut self.touched {
            touched.push(incarnation);
        }
    }

    pub(super) fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }
}
