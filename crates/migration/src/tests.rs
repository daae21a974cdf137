use crate::{files_of, findings, new_findings};

/// Each finding as `LINE what`.
fn found(path: &str, text: &str) -> Vec<String> {
    findings(path, text).into_iter().map(|finding| format!("{} {}", finding.line, finding.what)).collect()
}

#[test]
fn sql_that_takes_something_away() {
    for (sql, expected) in [
        ("DROP TABLE users;", "takes away the table users"),
        ("drop table if exists public.\"Users\" cascade", "takes away the table public.Users"),
        ("DROP SCHEMA audit CASCADE;", "takes away the schema audit"),
        ("DROP MATERIALIZED VIEW totals;", "takes away the view totals"),
        ("DROP TYPE mood;", "takes away the type mood"),
        ("ALTER TABLE users DROP COLUMN name;", "takes away the column name of users"),
        ("ALTER TABLE IF EXISTS ONLY users DROP IF EXISTS name;", "takes away the column name of users"),
        ("ALTER TABLE `users` ADD `a` int, DROP `name`;", "takes away the column name of users"),
        ("alter table users add column a numeric(10, 2), drop column b", "takes away the column b of users"),
        ("ALTER TABLE users RENAME COLUMN name TO title;", "renames the column name of users"),
        ("ALTER TABLE users RENAME TO people;", "renames users"),
        (
            "ALTER TABLE users ALTER COLUMN age TYPE text USING age::text;",
            "changes the type of the column age of users",
        ),
        ("ALTER TABLE users ALTER age SET NOT NULL;", "lets the column age of users be empty no more"),
        ("ALTER TABLE users MODIFY COLUMN age varchar(3);", "changes the type of the column age of users"),
        ("ALTER TABLE users CHANGE age years int;", "renames or changes the column age of users"),
        (
            "ALTER TABLE users ADD COLUMN age int NOT NULL;",
            "adds the column age to users, which old code leaves empty and which may not be",
        ),
        ("TRUNCATE users;", "empties users"),
        ("TRUNCATE TABLE users, roles;", "empties users"),
        ("DELETE FROM users WHERE left_at < now();", "deletes rows of users"),
        (
            "WITH gone AS (DELETE FROM users RETURNING id) INSERT INTO old SELECT * FROM gone;",
            "deletes rows of users",
        ),
        ("/*!40000 DROP TABLE users */;", "takes away the table users"),
        ("DO $$ BEGIN IF true THEN DROP TABLE users; END IF; END $$;", "takes away the table users"),
        (
            "DO $do$ BEGIN EXECUTE 'DROP ' || 'TABLE users'; END $do$;",
            "runs SQL that is put together at run time, which cannot be read",
        ),
        ("\\i other.sql", "runs SQL from elsewhere (\\i), which is not read"),
    ] {
        assert_eq!(found("a.sql", sql), [format!("1 {expected}")], "{sql}");
    }
}

#[test]
fn sql_that_only_adds() {
    for sql in [
        "CREATE TABLE users (id serial PRIMARY KEY, name text NOT NULL, deleted boolean);",
        "ALTER TABLE users ADD COLUMN age int;",
        "ALTER TABLE users ADD COLUMN age int NOT NULL DEFAULT 0, ADD b numeric(10, 2);",
        "ALTER TABLE users ADD COLUMN n bigserial NOT NULL;",
        "ALTER TABLE users DROP CONSTRAINT users_name_key;",
        "ALTER TABLE users ALTER COLUMN age DROP NOT NULL;",
        "ALTER TABLE users ALTER COLUMN age SET DEFAULT 1;",
        "ALTER TABLE users ADD CONSTRAINT f FOREIGN KEY (a) REFERENCES b (id) ON DELETE CASCADE;",
        "DROP INDEX CONCURRENTLY users_name;",
        "DROP TRIGGER t ON users;",
        "CREATE TRIGGER t AFTER DELETE ON users FOR EACH ROW EXECUTE FUNCTION f();",
        "CREATE TRIGGER t AFTER TRUNCATE ON users EXECUTE FUNCTION f();",
        "-- DROP TABLE users;\nSELECT 1;",
        "/* DROP TABLE users; /* inside */ DROP TABLE roles; */ SELECT 1;",
        "INSERT INTO notes VALUES ('it''s; DROP TABLE users;');",
        "INSERT INTO notes VALUES (E'it\\'s; DROP TABLE users;');",
        "COMMENT ON COLUMN users.\"drop table\" IS 'x';",
        "CREATE FUNCTION f() RETURNS void AS $body$ BEGIN DROP TABLE users; END $body$ LANGUAGE plpgsql;",
        "COPY users FROM stdin;\n1\tDROP TABLE users;\n\\.\nSELECT 1;",
        "UPDATE users SET age = 1;",
        "DELETE FROM alembic_version WHERE version_num = 'a';",
        "SELECT \"table\", $1 FROM users;",
        "\\echo DROP TABLE users",
        "GRANT DELETE, TRUNCATE ON users TO app;",
        "",
    ] {
        assert!(found("a.sql", sql).is_empty(), "{sql}: {:?}", found("a.sql", sql));
    }
}

#[test]
fn lines_are_counted_through_everything() {
    let sql = "-- one\n/* two\nthree */ CREATE TABLE a (t text DEFAULT 'x\ny');\nDO $$\nBEGIN\n  DROP TABLE b;\nEND\n$$;\nDROP TABLE c;\n";
    assert_eq!(found("a.sql", sql), ["6 takes away the table b", "10 takes away the table c"]);
}

/// Files that break off anywhere, and files of one kind taken for another, are read to their end all the same.
#[test]
fn nothing_is_too_broken_to_be_read() {
    let texts = [
        "DO $a$ BEGIN E'\\' \"ü\" $$ DROP TABLE `ä`; /* /* */ COPY a FROM stdin;\nx\n\\.\n",
        "op.execute(f\"\"\"DROP TABLE ü\"\"\", 'a\\'b')\ndef downgrade():\n x\n",
        "execute <<~SQL\n DROP TABLE ü;\nSQL\n t.remove :ä # 'x",
    ];
    for text in texts {
        let ends = text.char_indices().map(|(place, _)| place).chain([text.len()]);
        for end in ends {
            for path in ["a.sql", "a.py", "a.rb"] {
                let lines = text.lines().count().max(1);
                assert!(findings(path, &text[..end]).iter().all(|finding| finding.line <= lines));
            }
        }
    }
}

#[test]
fn what_grew_in_a_file_is_new() {
    let before = "CREATE TABLE a (b int);\nDROP TABLE old;\n";
    let now = format!("{before}ALTER TABLE a DROP b;\nDROP TABLE old;\n");
    let new: Vec<usize> = new_findings("a.sql", before, &now).iter().map(|finding| finding.line).collect();
    assert_eq!(new, [3, 4], "the second time it stands there it is another one");
    assert!(new_findings("a.sql", before, before).is_empty());
}

#[test]
fn alembic() {
    let text = r#"
"""drop table users: only words

Revision ID: 2
"""
from alembic import op

def upgrade():
    # op.drop_table("no")
    op.add_column("users", sa.Column("age", sa.Integer()))
    op.alter_column("users", "kind", server_default="x")
    op.drop_column("users", "name")
    with op.batch_alter_table("roles") as batch_op:
        batch_op.alter_column("kind", nullable=False)
    op.execute("""
        UPDATE users SET age = 1;
        DELETE FROM roles;
    """)
    op.execute(users.delete())


def downgrade():
    op.drop_column("users", "age")
    op.execute("DROP TABLE users")

def other():
    op.drop_table("users")
"#;
    assert_eq!(
        found("versions/2.py", text),
        [
            "12 takes away the column name of users",
            "14 lets the column kind be empty no more",
            "17 deletes rows of roles",
            "19 runs SQL that is put together at run time, which cannot be read",
            "27 takes away the table users",
        ]
    );
}

#[test]
fn django() {
    let text = r#"
class Migration(migrations.Migration):
    operations = [
        migrations.AddField(model_name="user", name="age", field=models.IntegerField(null=True)),
        migrations.RemoveField(model_name="user", name="title"),
        migrations.DeleteModel(name="Role"),
        migrations.RunSQL("CREATE INDEX i ON user (age)", "DROP TABLE user"),
        migrations.RunSQL(sql=[r'DROP TABLE role'], reverse_sql=""),
    ]
"#;
    assert_eq!(
        found("shop/migrations/0002_x.py", text),
        [
            "5 takes away the column title of user",
            "6 takes away the table of Role",
            "8 takes away the table role",
        ]
    );
}

#[test]
fn rails() {
    let text = r##"
class Change < ActiveRecord::Migration[7.1]
  def up
    add_column :users, :age, :integer # remove_column :users, :no
    remove_column :users, :name, :string
    change_column_null(:users, :age, false)
    change_table :roles do |t|
      t.remove :kind
    end
    execute <<~SQL
      CREATE TABLE a (b int);
      DROP TABLE c;
    SQL
    execute "TRUNCATE roles"
  end

  def down
    drop_table :users
    execute <<~SQL
      DROP TABLE d;
    SQL
  end
end
"##;
    assert_eq!(
        found("db/migrate/1_change.rb", text),
        [
            "5 takes away the column name of users",
            "6 lets the column age of users be empty no more",
            "8 takes away the column kind",
            "12 takes away the table c",
            "14 empties roles",
        ]
    );
}

#[test]
fn tools_and_their_files() {
    for (command, expected) in [
        ("venv/bin/alembic upgrade head", "**/versions/*.py"),
        ("venv/bin/python manage.py migrate --no-input", "**/migrations/*.py"),
        ("bundle exec rails db:migrate", "db/migrate/*.rb"),
        ("bin/migrate -path ./migrations -database x up", "migrations/*.up.sql"),
        ("migrate -source=file://db/ up", "db/*.up.sql"),
        ("psql --set ON_ERROR_STOP=1 -f sql/1.sql --file=sql/2.sql", "sql/1.sql sql/2.sql"),
        ("sh migrate.sh", ""),
    ] {
        let argv: Vec<String> = command.split(' ').map(str::to_owned).collect();
        assert_eq!(files_of(&argv).join(" "), expected, "{command}");
    }
}
