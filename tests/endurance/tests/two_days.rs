//! Two days, to know that the run itself runs; `tests/endurance/run` and `tests/run --long` live 24.

#[test]
#[ignore = "endurance: a minute or two"]
fn two_days() {
    let report = tillcast_endurance::live(&tillcast_endurance::Options { days: 2, day: 30.0, seed: 7, sample: true });
    println!("{report}");
    assert!(report.publishes[0] >= 2 && report.kills.len() >= 3, "{report}");
    assert!(report.svg.matches("<polyline").count() > 20);
}
