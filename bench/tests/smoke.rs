//! Every goal prints a row, whatever its figures are.

use std::collections::BTreeSet;
use std::process::Command;

#[test]
fn every_goal_prints_a_row_with_all_that_is_promised() {
    let output =
        Command::new(env!("CARGO_BIN_EXE_viommu-bench")).args(["--smoke", "--json"]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let mut goals = BTreeSet::new();
    for row in &rows {
        let goal = row["goal"].as_str().unwrap();
        assert!(row["ours"].as_f64().is_some_and(f64::is_finite), "{row}");
        assert!(row["unit"].is_string() && row["peers"].is_object(), "{row}");
        assert_eq!(row["met"].is_boolean(), goal != "none", "{row}");
        goals.insert(goal);
    }
    for number in 1..=17 {
        assert!(goals.contains(format!("G{number}").as_str()), "G{number} is missing");
    }
    assert!(goals.contains("V1"));
    let translate = rows.iter().find(|row| row["goal"] == "G1").unwrap();
    for peer in ["vm-memory", "rangemap", "crosvm", "radix"] {
        assert!(translate["peers"][peer].is_number(), "{peer}: {translate}");
    }
}

#[test]
fn a_goal_that_is_not_there_is_an_error() {
    let output = Command::new(env!("CARGO_BIN_EXE_viommu-bench")).args(["--only", "G18"]).output().unwrap();
    assert!(!output.status.success());
    assert!(String::from_utf8_lossy(&output.stderr).contains("G18"));
}

#[test]
fn only_chosen_goals_are_measured() {
    let arguments = ["--smoke", "--json", "--only", "g13,G4"];
    let output = Command::new(env!("CARGO_BIN_EXE_viommu-bench")).args(arguments).output().unwrap();
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
    let goals: Vec<_> = rows.iter().map(|row| row["goal"].as_str().unwrap()).collect();
    assert_eq!(goals, ["G4", "G13"]);
}
