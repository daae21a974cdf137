//! Ruby: gems are vendored in the build; Rails, puma and sidekiq.

use super::command::Candidate;
use super::{Draft, ProjectFacts};

const PORT: u16 = 3000;

pub(super) fn detect(facts: &ProjectFacts, draft: &mut Draft) {
    let Some(gemfile) = facts.files.get("Gemfile") else { return };
    let has_gem = |gem: &str| {
        gemfile.lines().any(|line| {
            let line = line.trim();
            line.starts_with(&format!("gem \"{gem}\"")) || line.starts_with(&format!("gem '{gem}'"))
        })
    };
    draft.build.push("bundle config set --local deployment true".to_owned());
    draft.build.push("bundle install".to_owned());
    draft.found("Gemfile: gems are vendored in the build");
    let stated = gemfile.lines().find_map(|line| line.trim().strip_prefix("ruby "));
    match (stated, facts.files.get(".ruby-version")) {
        (Some(version), _) => draft.runtime("ruby", version, "Gemfile"),
        (None, Some(version)) => {
            draft.runtime("ruby", version.trim().trim_start_matches("ruby-"), ".ruby-version");
        }
        (None, None) => {}
    }
    if has_gem("rails") {
        if facts.paths.contains("app/assets/") {
            draft.build.push("bundle exec rails assets:precompile".to_owned());
        }
        draft.found("Gemfile: Rails' migrations run once per rollout");
        draft.migrate = Some("bundle exec rails db:migrate".to_owned());
    }
    if has_gem("puma") {
        draft.usual =
            Some(Candidate::usual("web", "bundle exec puma --port {port}", Some(PORT), "Gemfile (puma)"));
    } else if has_gem("rails") {
        draft.usual = Some(Candidate::usual(
            "web",
            "bundle exec rails server --port {port}",
            Some(PORT),
            "Gemfile (rails)",
        ));
    }
}
