//! Rules about manifests: whatever takes a right says why, beside it.
//!
//! Looks at lines, not at YAML: `e2e/tests/deploy.rs` has it read by Kubernetes' own types.

use ballast_tidy::files;

/// What is a right, or gives one away, wherever it stands in a line.
const RIGHTS: [&str; 14] = [
    "hostPath:",
    "hostNetwork:",
    "hostPID:",
    "hostIPC:",
    "privileged: true",
    "allowPrivilegeEscalation: true",
    "add: [",
    "procMount:",
    "seccompProfile:",
    "appArmorProfile:",
    "runAsUser:",
    "mountPropagation:",
    "- apiGroups:",
    "pod-security.kubernetes.io/",
];

/// Lines, from 1, that take a right without a comment in them or above them. Above may also be
/// above the name of the list's entry that they belong to.
fn unexplained(text: &str) -> Vec<usize> {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let is_comment = |line: usize| lines.get(line).is_some_and(|line| line.starts_with('#'));
    let mut found = Vec::new();
    for (index, line) in lines.iter().enumerate() {
        if is_comment(index) || !RIGHTS.iter().any(|right| line.contains(right)) {
            continue;
        }
        let above = index.checked_sub(1);
        let is_name = above.is_some_and(|above| lines[above].starts_with("- name:"));
        let above = if is_name { index.checked_sub(2) } else { above };
        if !line.contains(" # ") && !above.is_some_and(is_comment) {
            found.push(index + 1);
        }
    }
    found
}

#[test]
fn every_right_has_its_reason() {
    let mut findings = Vec::new();
    let mut rights = 0;
    for file in files() {
        if file.path.starts_with("deploy/") && file.has_extension("yaml") {
            rights += RIGHTS.iter().map(|right| file.text.matches(right).count()).sum::<usize>();
            findings.extend(unexplained(&file.text).iter().map(|n| format!("{}:{n}", file.path)));
        }
    }
    assert!(rights > 20, "only {rights} rights found: the search is broken");
    assert!(findings.is_empty(), "rights without a reason:\n  {}", findings.join("\n  "));
}

#[test]
fn a_right_without_a_reason_is_found() {
    assert_eq!(unexplained("a: 1\nhostNetwork: true\n"), [2]);
    assert_eq!(unexplained("# why\n- name: dev\n  hostPath: {path: /dev}\n"), []);
    assert_eq!(unexplained("# why\n- name: dev\n  x: 1\n  hostPath: {path: /dev}\n"), [4]);
    assert_eq!(unexplained("capabilities: {add: [SYS_ADMIN]}\n"), [1]);
    assert_eq!(unexplained("privileged: true  # why\n"), []);
}
