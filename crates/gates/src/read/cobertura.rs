//! Cobertura XML, as coverage.py, gcovr, Istanbul, cargo-llvm-cov and others write it.

use greenlight_model::evidence::Fact;
use roxmltree::Node;

use super::{ReadError, Report, xml};

/// Reads a report: the lines that were reached, of all.
///
/// # Errors
/// When it is not whole, is something else, or has no line at all.
pub fn cobertura(text: &str) -> Result<Report, ReadError> {
    let document = xml(text)?;
    let root = document.root_element();
    if !root.has_tag_name("coverage") {
        let name = root.tag_name().name();
        return Err(ReadError::new(format!(
            "it is no Cobertura report: those begin with `coverage`, this one with `{name}`"
        )));
    }
    let (covered, lines) = match (number(&root, "lines-covered")?, number(&root, "lines-valid")?) {
        (Some(covered), Some(lines)) => (covered, lines),
        _ => counted(&root)?,
    };
    if lines == 0 {
        return Err(ReadError::new("it has no line of code, so it measured nothing"));
    }
    if covered > lines {
        return Err(ReadError::new(format!(
            "it says that more lines were reached, {covered}, than there are, {lines}"
        )));
    }
    Ok(Report { facts: vec![Fact::Coverage { covered, lines }], commit: None })
}

/// Old writers state only a rate, which is rounded: the lines of the classes are counted instead. Those of methods are
/// among them.
fn counted(root: &Node<'_, '_>) -> Result<(u64, u64), ReadError> {
    let (mut covered, mut all) = (0, 0);
    let classes = root.descendants().filter(|node| node.has_tag_name("class"));
    let lines = classes
        .flat_map(|class| class.children())
        .filter(|node| node.has_tag_name("lines"))
        .flat_map(|lines| lines.children())
        .filter(|node| node.has_tag_name("line"));
    for line in lines {
        all += 1;
        if number(&line, "hits")?.is_some_and(|hits| hits > 0) {
            covered += 1;
        }
    }
    Ok((covered, all))
}

fn number(node: &Node<'_, '_>, name: &str) -> Result<Option<u64>, ReadError> {
    let Some(text) = node.attribute(name) else { return Ok(None) };
    let number = text.trim().parse();
    number.map(Some).map_err(|_| ReadError::new(format!("its `{name}` is no number: `{text}`")))
}
