//! The tables and the CSV.

use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

use crate::Run;

/// Writes `csi.csv` and `csi.md`.
pub fn write(folder: &Path, runs: &[Run]) {
    let tables: String = runs.iter().map(table).collect();
    std::fs::create_dir_all(folder).expect("a folder can be made");
    std::fs::write(folder.join("csi.csv"), csv(runs)).expect("a file can be written");
    std::fs::write(folder.join("csi.md"), &tables).expect("a file can be written");
    print!("{tables}");
}

const HEAD: &str = "| step | median ms | p90 ms | max ms | all s | CPU ms per volume |\n\
                    |---|--:|--:|--:|--:|--:|\n";

const PROGRAMS: &str = "| program | runs per volume | median ms | max ms | all s |\n\
                        |---|--:|--:|--:|--:|\n";

fn table(run: &Run) -> String {
    let mut table = format!("### {} at a time\n\n{HEAD}", run.parallel);
    let (mut wall, mut cpu) = (Duration::ZERO, Duration::ZERO);
    for it in &run.calls {
        (wall, cpu) = (wall + it.wall, cpu + it.cpu);
        let [median, p90, max] = percentiles(&it.each).map(ms);
        let (all, each) = (it.wall.as_secs_f64(), ms(it.cpu / it.each.len() as u32));
        let call = it.call;
        let _ = writeln!(table, "| {call:?} | {median} | {p90} | {max} | {all:.1} | {each} |");
    }
    let volumes = run.calls.first().map_or(1, |it| it.each.len()) as u32;
    let (each, cpu) = (ms(wall / volumes), ms(cpu / volumes));
    let total = wall.as_secs_f64();
    let _ = writeln!(
        table,
        "\n{volumes} volumes in {total:.1} s: {each} ms and {cpu} ms of CPU for each.\n"
    );
    table += PROGRAMS;
    for (program, times) in &run.programs {
        let runs = times.len() as f64 / f64::from(volumes);
        let [median, _, max] = percentiles(times);
        let all = times.iter().sum::<u64>() as f64 / 1000.0;
        let _ = writeln!(table, "| {program} | {runs:.1} | {median} | {max} | {all:.1} |");
    }
    table + "\n"
}

fn csv(runs: &[Run]) -> String {
    let mut csv = "parallel,call,volumes,wall_ms,cpu_ms,median_ms,p90_ms,max_ms\n".to_owned();
    for run in runs {
        for it in &run.calls {
            let [median, p90, max] = percentiles(&it.each).map(ms);
            let (parallel, call, volumes) = (run.parallel, it.call, it.each.len());
            let (wall, cpu) = (ms(it.wall), ms(it.cpu));
            let _ =
                writeln!(csv, "{parallel},{call:?},{volumes},{wall},{cpu},{median},{p90},{max}");
        }
    }
    csv
}

/// The median, what nine of ten stay within, and the longest.
fn percentiles<T: Ord + Copy>(times: &[T]) -> [T; 3] {
    let mut times = times.to_vec();
    times.sort();
    [50, 90, 100].map(|percent| times[(times.len() - 1) * percent / 100])
}

fn ms(time: Duration) -> String {
    format!("{:.1}", time.as_secs_f64() * 1000.0)
}
