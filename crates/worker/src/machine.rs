//! How much memory this machine gives a job: what is built in, or less where a control group allows less.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

/// Memory of a machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MachineMemory {
    /// The most that all processes of a job here can have together.
    pub limit_bytes: u64,
    /// What sets that limit.
    pub limit_by: LimitBy,
    /// As much of it as nobody uses now.
    pub available_bytes: u64,
}

/// What bounds memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LimitBy {
    /// The memory that is built in.
    Machine,
    /// A control group, such as a container's.
    Cgroup,
}

impl MachineMemory {
    /// Of this machine and this process's control groups; `None` where the system does not tell.
    pub fn here() -> Option<Self> {
        Self::read(Path::new("/proc"), Path::new("/sys/fs/cgroup"))
    }

    /// As the files under `proc` and `cgroups` say.
    pub fn read(proc: &Path, cgroups: &Path) -> Option<Self> {
        let text = fs::read_to_string(proc.join("meminfo")).ok()?;
        let kib = |field: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(field))?;
            let number: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(number << 10)
        };
        let mut memory = Self {
            limit_bytes: kib("MemTotal:")?,
            limit_by: LimitBy::Machine,
            available_bytes: kib("MemAvailable:")?,
        };
        let groups = fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
        for group in groups
            .lines()
            .filter_map(|line| Group::parse(line, cgroups))
        {
            group.bound(&mut memory);
        }
        Some(memory)
    }
}

/// A control group that bounds memory, in the first or the second version of their files.
struct Group {
    root: PathBuf,
    /// Below the root; inside a container it may not be there, and the root is the group itself.
    path: PathBuf,
    files: Files,
}

struct Files {
    limit: &'static str,
    usage: &'static str,
    /// Pages of files that are dropped when memory is wanted.
    droppable: &'static str,
}

impl Group {
    /// From a line of /proc/self/cgroup: `ID:CONTROLLERS:PATH`.
    fn parse(line: &str, cgroups: &Path) -> Option<Self> {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let (root, files) = if controllers.is_empty() {
            let files = Files {
                limit: "memory.max",
                usage: "memory.current",
                droppable: "inactive_file ",
            };
            (cgroups.to_owned(), files)
        } else if controllers.split(',').any(|it| it == "memory") {
            let files = Files {
                limit: "memory.limit_in_bytes",
                usage: "memory.usage_in_bytes",
                droppable: "total_inactive_file ",
            };
            (cgroups.join("memory"), files)
        } else {
            return None;
        };
        Some(Self {
            path: root.join(path.trim_start_matches('/')),
            root,
            files,
        })
    }

    /// Every group above this one bounds it too.
    fn bound(&self, memory: &mut MachineMemory) {
        for folder in self.path.ancestors() {
            self.bound_by(folder, memory);
            if folder == self.root {
                break;
            }
        }
    }

    fn bound_by(&self, folder: &Path, memory: &mut MachineMemory) {
        let number = |name: &str| -> Option<u64> {
            let text = fs::read_to_string(folder.join(name)).ok()?;
            text.trim().parse().ok()
        };
        // No limit reads as `max`, or as a number beyond all machines.
        let Some(limit) = number(self.files.limit) else {
            return;
        };
        if limit < memory.limit_bytes {
            memory.limit_bytes = limit;
            memory.limit_by = LimitBy::Cgroup;
        }
        let used = number(self.files.usage).unwrap_or(0);
        let stat = fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
        let droppable = stat
            .lines()
            .find_map(|line| line.strip_prefix(self.files.droppable)?.parse().ok())
            .unwrap_or(0);
        let free = limit.saturating_sub(used.saturating_sub(droppable));
        memory.available_bytes = memory.available_bytes.min(free);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A machine of 1,000 MiB with 600 available, its control groups as given.
    fn read(cgroup: &str, files: &[(&str, &str)]) -> MachineMemory {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let write = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("a folder");
            fs::write(path, text).expect("write");
        };
        write(
            "proc/meminfo",
            "MemTotal:        1024000 kB\nMemFree: 1 kB\nMemAvailable:   614400 kB\n",
        );
        write("proc/self/cgroup", cgroup);
        for (name, text) in files {
            write(&format!("cgroup/{name}"), text);
        }
        let read = MachineMemory::read(&folder.path().join("proc"), &folder.path().join("cgroup"));
        read.expect("a machine's memory")
    }

    fn check(memory: &MachineMemory, limit_mib: u64, limit_by: LimitBy, available_mib: u64) {
        let expected = MachineMemory {
            limit_bytes: limit_mib * MIB,
            limit_by,
            available_bytes: available_mib * MIB,
        };
        assert_eq!(*memory, expected);
    }

    #[test]
    fn without_a_limit_the_machine_is_the_limit() {
        check(&read("", &[]), 1000, LimitBy::Machine, 600);
        let files = [("a/memory.max", "max\n"), ("a/memory.current", "5\n")];
        check(&read("0::/a\n", &files), 1000, LimitBy::Machine, 600);
        let files = [("memory/a/memory.limit_in_bytes", "9223372036854771712\n")];
        check(&read("4:memory:/a\n", &files), 1000, LimitBy::Machine, 600);
    }

    #[test]
    fn the_second_version_counts_droppable_pages_as_free() {
        let files = [
            ("a/b/memory.max", "419430400\n"),
            ("a/b/memory.current", "209715200\n"),
            ("a/b/memory.stat", "anon 1\ninactive_file 104857600\n"),
        ];
        check(&read("0::/a/b\n", &files), 400, LimitBy::Cgroup, 300);
    }

    #[test]
    fn a_group_above_bounds_too_and_so_does_the_root_inside_a_container() {
        let files = [
            ("a/memory.max", "104857600\n"),
            ("a/b/memory.max", "209715200\n"),
        ];
        check(&read("0::/a/b\n", &files), 100, LimitBy::Cgroup, 100);
        let files = [("memory/memory.limit_in_bytes", "104857600\n")];
        let groups = "7:blkio:/x\n4:memory:/not/seen/here\n";
        check(&read(groups, &files), 100, LimitBy::Cgroup, 100);
    }

    #[test]
    fn the_first_version_has_names_of_its_own() {
        let files = [
            ("memory/a/memory.limit_in_bytes", "419430400\n"),
            ("memory/a/memory.usage_in_bytes", "314572800\n"),
            (
                "memory/a/memory.stat",
                "inactive_file 1\ntotal_inactive_file 52428800\n",
            ),
        ];
        let memory = read("0::/\n4:cpu,memory:/a\n", &files);
        check(&memory, 400, LimitBy::Cgroup, 150);
    }
}
