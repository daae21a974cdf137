//! Times that come round: windows in which deployments may begin, and periods in which they may not.
//!
//! A window is in the wall clock of its zone, so it keeps its hours when clocks change. Zones are those of the IANA
//! database that is compiled in: every machine that judges a window judges it alike, whatever is installed there.

use std::collections::BTreeSet;
use std::fmt;
use std::str::FromStr;

use jiff::civil::{Date, Weekday};
use jiff::tz::{TimeZone, TimeZoneDatabase};
use jiff::{SignedDuration, Span, Timestamp, Zoned};
use serde::{Deserialize, Serialize};

use crate::quantity::InvalidQuantity;

const MINUTES_OF_DAY: u16 = 24 * 60;
/// Days looked ahead for the next time: each day of the week comes within eight.
const DAYS_AHEAD_MAX: i64 = 8;

const WINDOW: &str = "a window such as \"Mon-Fri 09:00-16:00 Europe/Zurich\"";
const PERIOD: &str = "a period such as \"2026-12-20..2027-01-03\", \"12-20..01-03\" (each year) or \"Fri 12:00-24:00 Europe/Zurich\"";

/// Hours of some days of the week: `Mon-Fri 09:00-16:00 Europe/Zurich`. Hours that end before they begin go on past
/// midnight. Without a zone it is UTC.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Window {
    text: String,
    /// Days on which it opens, Monday 0.
    days: BTreeSet<i8>,
    from_minute: u16,
    until_minute: u16,
    zone: Zone,
}

/// A time zone that is known.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Zone(TimeZone);

impl Zone {
    fn named(name: &str) -> Option<Self> {
        TimeZoneDatabase::bundled().get(name).ok().map(Self)
    }

    fn at(&self, now: Timestamp) -> Zoned {
        now.to_zoned(self.0.clone())
    }
}

/// A period in which nothing may begin: dates, dates of each year, or hours of some days of the week.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Period {
    text: String,
    when: When,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum When {
    Weekly(Window),
    /// The first and the last day.
    Dates(Date, Date, Zone),
    /// The month and day of the first and of the last day.
    Yearly((i8, i8), (i8, i8), Zone),
}

impl Window {
    /// Whether it is open.
    #[must_use]
    pub fn is_open(&self, now: Timestamp) -> bool {
        self.closes(now).is_some()
    }

    /// When it closes, if it is open.
    #[must_use]
    pub fn closes(&self, now: Timestamp) -> Option<Timestamp> {
        let today = self.zone.at(now).date();
        // One that began yesterday may go on past midnight.
        [-1, 0].into_iter().find_map(|day| {
            let (opens, closes) = self.on(today, day)?;
            (opens <= now && now < closes).then_some(closes)
        })
    }

    /// When it opens next, if it is shut.
    #[must_use]
    pub fn opens(&self, now: Timestamp) -> Option<Timestamp> {
        if self.is_open(now) {
            return None;
        }
        let today = self.zone.at(now).date();
        (0..=DAYS_AHEAD_MAX).find_map(|day| {
            let (opens, _) = self.on(today, day)?;
            (opens > now).then_some(opens)
        })
    }

    /// A time as its zone writes it.
    #[must_use]
    pub fn shown(&self, at: Timestamp) -> String {
        shown(&self.zone, at)
    }

    fn on(&self, today: Date, days_later: i64) -> Option<(Timestamp, Timestamp)> {
        let date = today.checked_add(Span::new().days(days_later)).ok()?;
        if !self.days.contains(&date.weekday().to_monday_zero_offset()) {
            return None;
        }
        let last = if self.until_minute <= self.from_minute { date.tomorrow().ok()? } else { date };
        Some((self.minute(date, self.from_minute)?, self.minute(last, self.until_minute)?))
    }

    fn minute(&self, date: Date, minute: u16) -> Option<Timestamp> {
        let (date, minute) =
            if minute == MINUTES_OF_DAY { (date.tomorrow().ok()?, 0) } else { (date, minute) };
        let (hour, minute) = (i8::try_from(minute / 60).ok()?, i8::try_from(minute % 60).ok()?);
        let zoned = date.at(hour, minute, 0, 0).to_zoned(self.zone.0.clone()).ok()?;
        Some(zoned.timestamp())
    }
}

impl Period {
    /// When it ends, if it is now. Days end at midnight of the period's zone.
    #[must_use]
    pub fn ends(&self, now: Timestamp) -> Option<Timestamp> {
        match &self.when {
            When::Weekly(window) => window.closes(now),
            When::Dates(from, until, zone) => {
                let today = zone.at(now).date();
                if !(*from..=*until).contains(&today) {
                    return None;
                }
                midnight_after(*until, zone)
            }
            When::Yearly(from, until, zone) => {
                let today = zone.at(now).date();
                let day = (today.month(), today.day());
                let wraps = from > until;
                let is_in =
                    if wraps { day >= *from || day <= *until } else { (*from..=*until).contains(&day) };
                if !is_in {
                    return None;
                }
                let year = if wraps && day >= *from { today.year().checked_add(1)? } else { today.year() };
                // The 29th of February is the 28th in other years.
                let last =
                    Date::new(year, until.0, until.1).or_else(|_| Date::new(year, until.0, 28)).ok()?;
                midnight_after(last, zone)
            }
        }
    }

    /// A time as its zone writes it.
    #[must_use]
    pub fn shown(&self, at: Timestamp) -> String {
        match &self.when {
            When::Weekly(window) => window.shown(at),
            When::Dates(_, _, zone) | When::Yearly(_, _, zone) => shown(zone, at),
        }
    }
}

fn midnight_after(date: Date, zone: &Zone) -> Option<Timestamp> {
    Some(date.tomorrow().ok()?.to_zoned(zone.0.clone()).ok()?.timestamp())
}

fn shown(zone: &Zone, at: Timestamp) -> String {
    let name = zone.0.iana_name().unwrap_or("UTC");
    format!("{} {name}", zone.at(at).strftime("%a %Y-%m-%d %H:%M"))
}

/// How long it is from now until then; nothing when that has passed.
#[must_use]
pub fn left(now: Timestamp, until: Timestamp) -> std::time::Duration {
    until.duration_since(now).max(SignedDuration::ZERO).unsigned_abs()
}

const DAYS: [(&str, Weekday); 7] = [
    ("mon", Weekday::Monday),
    ("tue", Weekday::Tuesday),
    ("wed", Weekday::Wednesday),
    ("thu", Weekday::Thursday),
    ("fri", Weekday::Friday),
    ("sat", Weekday::Saturday),
    ("sun", Weekday::Sunday),
];

fn day(text: &str) -> Option<i8> {
    let text = text.to_ascii_lowercase();
    DAYS.iter().find(|(name, _)| *name == text).map(|(_, day)| day.to_monday_zero_offset())
}

/// `Mon`, `Mon-Fri`, `Sat,Sun`, `daily`.
fn days(text: &str) -> Option<BTreeSet<i8>> {
    if text.eq_ignore_ascii_case("daily") {
        return Some((0..7).collect());
    }
    let mut days = BTreeSet::new();
    for part in text.split(',') {
        match part.split_once('-') {
            None => {
                days.insert(day(part)?);
            }
            Some((first, last)) => {
                let (first, last) = (day(first)?, day(last)?);
                // `Sat-Mon` goes round the end of the week.
                days.extend((0..7).map(|later| (first + later) % 7).take_while(|day| *day != last));
                days.insert(last);
            }
        }
    }
    Some(days)
}

fn minute(text: &str) -> Option<u16> {
    let (hour, minute) = text.split_once(':')?;
    if hour.len() != 2 || minute.len() != 2 {
        return None;
    }
    let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
    let total = hour.checked_mul(60)?.checked_add(minute)?;
    (minute < 60 && total <= MINUTES_OF_DAY).then_some(total)
}

fn zone(text: Option<&str>) -> Result<Zone, ()> {
    Zone::named(text.unwrap_or("UTC")).ok_or(())
}

fn read_window(text: &str) -> Option<Window> {
    let mut words = text.split_whitespace();
    let days = days(words.next()?)?;
    let (from, until) = words.next()?.split_once('-')?;
    let (from_minute, until_minute) = (minute(from)?, minute(until)?);
    let zone = zone(words.next()).ok()?;
    let is_whole = words.next().is_none() && from_minute < MINUTES_OF_DAY && from_minute != until_minute;
    is_whole.then(|| Window { text: text.to_owned(), days, from_minute, until_minute, zone })
}

impl FromStr for Window {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        read_window(text).ok_or_else(|| InvalidQuantity { text: text.to_owned(), kind: WINDOW })
    }
}

fn day_of_year(text: &str) -> Option<(i8, i8)> {
    let (month, day) = text.split_once('-')?;
    let (month, day) = (month.parse().ok()?, day.parse().ok()?);
    // 2024 had a 29th of February.
    Date::new(2024, month, day).ok().map(|_| (month, day))
}

fn read_period(text: &str) -> Option<When> {
    if let Some(window) = read_window(text) {
        return Some(When::Weekly(window));
    }
    let mut words = text.split_whitespace();
    let (from, until) = words.next()?.split_once("..")?;
    let zone = zone(words.next()).ok()?;
    if words.next().is_some() {
        return None;
    }
    if let (Ok(from), Ok(until)) = (from.parse::<Date>(), until.parse::<Date>()) {
        return (from <= until).then_some(When::Dates(from, until, zone));
    }
    Some(When::Yearly(day_of_year(from)?, day_of_year(until)?, zone))
}

impl FromStr for Period {
    type Err = InvalidQuantity;
    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let when =
            read_period(text).ok_or_else(|| InvalidQuantity { text: text.to_owned(), kind: PERIOD })?;
        Ok(Self { text: text.to_owned(), when })
    }
}

macro_rules! as_text {
    ($($type:ty),*) => { $(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.text)
            }
        }

        impl TryFrom<String> for $type {
            type Error = InvalidQuantity;
            fn try_from(text: String) -> Result<Self, InvalidQuantity> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.text
            }
        }
    )* };
}
as_text!(Window, Period);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn a_window_keeps_the_hours_of_its_zone() {
        let window: Window = "Thu 09:00-16:00 America/Los_Angeles".parse().unwrap();
        // Thursday, 26 November 2026 is in winter (UTC-8), Thursday, 2 July 2026 in summer (UTC-7).
        for (time, is_open) in [
            ("2026-11-26T16:59:59Z", false),
            ("2026-11-26T17:00:00Z", true),
            ("2026-11-26T23:59:59Z", true),
            ("2026-11-27T00:00:00Z", false),
            ("2026-07-02T16:00:00Z", true),
            ("2026-07-02T15:59:00Z", false),
            ("2026-07-03T16:30:00Z", false),
        ] {
            assert_eq!(window.is_open(at(time)), is_open, "{time}");
        }
        let opens = window.opens(at("2026-11-21T16:00:00Z")).unwrap();
        assert_eq!(opens, at("2026-11-26T17:00:00Z"));
        assert_eq!(window.shown(opens), "Thu 2026-11-26 09:00 America/Los_Angeles");
        // On the day itself, after it has closed, it is a week.
        assert_eq!(window.opens(at("2026-11-27T01:00:00Z")).unwrap(), at("2026-12-03T17:00:00Z"));
        assert_eq!(window.closes(at("2026-11-26T18:00:00Z")).unwrap(), at("2026-11-27T00:00:00Z"));
    }

    #[test]
    fn hours_may_go_past_midnight_and_days_round_the_week() {
        let window: Window = "Sat-Sun 22:00-02:00".parse().unwrap();
        // 21 November 2026 is a Saturday.
        for (time, is_open) in [
            ("2026-11-21T01:00:00Z", false),
            ("2026-11-21T22:00:00Z", true),
            ("2026-11-22T01:59:00Z", true),
            ("2026-11-23T01:59:00Z", true),
            ("2026-11-24T01:00:00Z", false),
        ] {
            assert_eq!(window.is_open(at(time)), is_open, "{time}");
        }
        let round: Window = "Sat-Mon 00:00-24:00 UTC".parse().unwrap();
        assert!(round.is_open(at("2026-11-23T12:00:00Z")) && !round.is_open(at("2026-11-24T12:00:00Z")));
    }

    #[test]
    fn periods_end() {
        let ends = |text: &str, now: &str| text.parse::<Period>().unwrap().ends(at(now));
        let dates = "2026-12-20..2027-01-03 Europe/Zurich";
        assert_eq!(ends(dates, "2026-12-19T22:59:59Z"), None);
        assert_eq!(ends(dates, "2026-12-19T23:00:00Z"), Some(at("2027-01-03T23:00:00Z")));
        assert_eq!(ends(dates, "2027-01-03T23:00:00Z"), None);
        let yearly = "12-20..01-03";
        assert_eq!(ends(yearly, "2030-12-31T12:00:00Z"), Some(at("2031-01-04T00:00:00Z")));
        assert_eq!(ends(yearly, "2031-01-03T12:00:00Z"), Some(at("2031-01-04T00:00:00Z")));
        assert_eq!(ends(yearly, "2031-01-04T00:00:00Z"), None);
        assert_eq!(ends("02-01..02-29", "2027-02-28T12:00:00Z"), Some(at("2027-03-01T00:00:00Z")));
        assert_eq!(ends("Fri 12:00-24:00", "2026-11-27T13:00:00Z"), Some(at("2026-11-28T00:00:00Z")));
    }

    #[test]
    fn what_is_no_time_is_refused() {
        for bad in [
            "",
            "Thu",
            "Thu 9:00-16:00",
            "Thu 09:00-24:01",
            "Thu 09:60-10:00",
            "Foo 09:00-10:00",
            "Thu 09:00-09:00",
            "Thu 24:00-02:00",
            "Thu 09:00-16:00 Mars/Olympus",
            "Thu 09:00-16:00 UTC UTC",
        ] {
            assert!(bad.parse::<Window>().is_err(), "{bad}");
        }
        for bad in
            ["2026-12-20..2026-12-19", "12-20", "13-01..13-02", "2026-02-30..2026-03-01", "12-20..01-03 X"]
        {
            assert!(bad.parse::<Period>().is_err(), "{bad}");
        }
        let text = "\"Mon,Wed 09:00-16:00 Europe/Zurich\"";
        let window: Window = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&window).unwrap(), text);
    }
}
