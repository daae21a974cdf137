//! Which files a known tool reads, from how it is called.

/// The patterns of the files that hold what a command does to a database, where it is a tool that is known: Alembic, Django,
/// Rails, golang-migrate, `psql`. None where it is not.
#[must_use]
pub fn files_of(argv: &[String]) -> Vec<String> {
    let words: Vec<&str> = argv.iter().map(String::as_str).collect();
    let program = |word: &str| word.rsplit('/').next().unwrap_or(word).to_owned();
    let has = |wanted: &str| words.iter().any(|word| program(word) == wanted);
    let patterns: Vec<String> = if has("alembic") || has("flask") && words.contains(&"db") {
        vec!["**/versions/*.py".to_owned()]
    } else if (has("manage.py") || has("django-admin")) && words.contains(&"migrate") {
        vec!["**/migrations/*.py".to_owned()]
    } else if words.iter().any(|word| word.starts_with("db:")) && (has("rails") || has("rake")) {
        vec!["db/migrate/*.rb".to_owned()]
    } else if has("psql") {
        valued(&words, &["-f", "--file"]).map(str::to_owned).collect()
    } else if has("migrate") {
        let places = valued(&words, &["-path", "--path"]).chain(
            valued(&words, &["-source", "--source"]).filter_map(|source| source.strip_prefix("file://")),
        );
        places.map(|place| format!("{}/*.up.sql", place.trim_end_matches('/'))).collect()
    } else {
        Vec::new()
    };
    patterns.into_iter().map(|pattern| pattern.trim_start_matches("./").to_owned()).collect()
}

/// The values of an option, given as the next word or after `=`.
fn valued<'a>(words: &'a [&'a str], names: &'a [&'a str]) -> impl Iterator<Item = &'a str> {
    words.iter().enumerate().filter_map(move |(place, word)| {
        names.iter().find_map(|name| {
            if word == name {
                return words.get(place + 1).copied();
            }
            word.strip_prefix(name)?.strip_prefix('=')
        })
    })
}
