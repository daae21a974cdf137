//! Route templates: the few names under which many paths are counted.
//!
//! Paths hold ids, so counting by path would grow without bound and say little. What no template matches is counted under
//! [`OTHER_ROUTE`].

use std::sync::Arc;

/// Most templates: every request is held against them until one matches, and every one is a row per backend.
pub const MAX_ROUTES: usize = 64;
/// Longest template, in bytes.
pub const MAX_ROUTE_BYTES: usize = 256;
/// The route of what no template matches.
pub const OTHER_ROUTE: &str = "other";

/// The templates of a state. The first that matches counts.
#[derive(Debug, Default)]
pub(crate) struct Routes {
    templates: Vec<Template>,
}

#[derive(Debug)]
struct Template {
    text: Arc<str>,
    segments: Vec<Segment>,
    /// Ends in `*`: more segments may follow.
    is_open: bool,
}

#[derive(Debug)]
enum Segment {
    Exactly(Box<str>),
    /// `{name}`: one segment that is not empty.
    Any,
}

impl Routes {
    /// # Errors
    /// What is wrong with which template.
    pub(crate) fn new(templates: &[String]) -> Result<Self, String> {
        if templates.len() > MAX_ROUTES {
            return Err(format!("{} routes are more than {MAX_ROUTES}", templates.len()));
        }
        for (index, text) in templates.iter().enumerate() {
            if templates[..index].contains(text) {
                return Err(format!("route {text:?} is there twice"));
            }
        }
        let templates = templates.iter().map(|text| Template::new(text)).collect::<Result<_, _>>()?;
        Ok(Self { templates })
    }

    /// How many rows there are, with that of [`OTHER_ROUTE`].
    pub(crate) fn count(&self) -> usize {
        self.templates.len() + 1
    }

    /// The row of a path, without its query.
    pub(crate) fn index_of(&self, path: &str) -> usize {
        self.templates.iter().position(|template| template.matches(path)).unwrap_or(self.templates.len())
    }

    pub(crate) fn name(&self, index: usize) -> &str {
        self.templates.get(index).map_or(OTHER_ROUTE, |template| &template.text)
    }
}

impl Template {
    fn new(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| Err(format!("route {text:?} {why}"));
        if text.len() > MAX_ROUTE_BYTES || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return wrong(&format!(
                "must be at most {MAX_ROUTE_BYTES} printable ASCII characters without blanks"
            ));
        }
        let Some(rest) = text.strip_prefix('/') else { return wrong("must begin with '/'") };
        let (rest, is_open) = match rest.strip_suffix('*') {
            Some("") => ("", true),
            Some(before) => match before.strip_suffix('/') {
                Some(before) => (before, true),
                None => return wrong("may have '*' only as its last segment"),
            },
            None => (rest, false),
        };
        let mut segments = Vec::new();
        if !(is_open && rest.is_empty()) {
            for segment in rest.split('/') {
                segments.push(match segment.strip_prefix('{').and_then(|inner| inner.strip_suffix('}')) {
                    Some(name) if !name.is_empty() && !name.contains(['{', '}']) => Segment::Any,
                    _ if segment.contains(['{', '}', '*', '?', '#']) => {
                        return wrong("may have '{name}' only as a whole segment, and neither '?' nor '#'");
                    }
                    _ => Segment::Exactly(segment.into()),
                });
            }
        }
        Ok(Self { text: text.into(), segments, is_open })
    }

    fn matches(&self, path: &str) -> bool {
        let Some(path) = path.strip_prefix('/') else { return false };
        let mut given = path.split('/');
        let all = self.segments.iter().all(|segment| match (segment, given.next()) {
            (Segment::Exactly(text), Some(given)) => **text == *given,
            (Segment::Any, Some(given)) => !given.is_empty(),
            (_, None) => false,
        });
        all && (self.is_open || given.next().is_none())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_template_that_matches_counts() {
        let templates = ["/", "/users/me", "/users/{id}", "/users/{id}/posts/{post}", "/static/*"];
        let routes = Routes::new(&templates.map(str::to_owned)).unwrap();
        for (path, expected) in [
            ("/", "/"),
            ("/users/me", "/users/me"),
            ("/users/7", "/users/{id}"),
            ("/users/", OTHER_ROUTE),
            ("/users", OTHER_ROUTE),
            ("/users/7/", OTHER_ROUTE),
            ("/users/7/posts/8", "/users/{id}/posts/{post}"),
            ("/static/a/b.css", "/static/*"),
            ("/static/", "/static/*"),
            ("/static", "/static/*"),
            ("/statics", OTHER_ROUTE),
            ("*", OTHER_ROUTE),
            ("", OTHER_ROUTE),
        ] {
            assert_eq!(routes.name(routes.index_of(path)), expected, "{path}");
        }
        let all = Routes::new(&["/*".to_owned()]).unwrap();
        assert_eq!((all.index_of("/"), all.index_of("/a/b"), all.count()), (0, 0, 2));
    }

    #[test]
    fn templates_that_say_nothing_clear_are_refused() {
        for bad in ["", "a", "/a b", "/a*", "/*/a", "/{a}b", "/{}", "/a?b", "/{a{b}}", "/\u{e9}"] {
            assert!(Routes::new(&[bad.to_owned()]).is_err(), "{bad:?}");
        }
        assert!(Routes::new(&["/a".to_owned(), "/a".to_owned()]).is_err());
        assert!(Routes::new(&vec!["/a".to_owned(); MAX_ROUTES + 1]).is_err());
    }
}
