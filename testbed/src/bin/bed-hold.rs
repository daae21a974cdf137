//! Brings up a bed of one host, prints its name, and holds it until standard input ends. The tests kill it, to
//! see that the next bed clears what it left.

use std::io::{Read, Write};

use greenlight_testbed::{Bed, Error, Init};

fn main() -> Result<(), Error> {
    let bed = Bed::builder("hold").host("web", Init::None).up()?;
    let mut stdout = std::io::stdout();
    let told = writeln!(stdout, "{}", bed.name()).and_then(|()| stdout.flush());
    told.and_then(|()| std::io::stdin().read_to_end(&mut Vec::new()).map(drop)).map_err(|source| {
        Error::System { doing: "speak with the process that started this".into(), source }
    })?;
    bed.down()
}
