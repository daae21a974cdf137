//! XML-RPC over supervisord's socket: as much of it as its methods need.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// Numbers of the faults that are told apart.
pub(super) mod fault {
    pub(in super::super) const BAD_NAME: i64 = 10;
    pub(in super::super) const ALREADY_STARTED: i64 = 60;
    pub(in super::super) const NOT_RUNNING: i64 = 70;
    pub(in super::super) const ALREADY_ADDED: i64 = 90;
}

/// An answer has some kilobytes, one line per program.
const ANSWER_BYTES_MAX: u64 = 8 * 1024 * 1024;

/// supervisord's socket.
#[derive(Debug)]
pub(super) struct Rpc {
    pub(super) socket: PathBuf,
    /// Name and password, where the socket asks for them.
    pub(super) user: Option<(String, String)>,
}

/// A value of XML-RPC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    Text(String),
    Number(i64),
    Boolean(bool),
    List(Vec<Value>),
    Members(Vec<(String, Value)>),
}

/// Why a call has no value.
#[derive(Debug, thiserror::Error)]
pub(super) enum RpcError {
    /// It could not be asked, or its answer could not be understood.
    #[error("{0}")]
    Transport(String),
    /// It answered that it cannot.
    #[error("{text} (fault {code})")]
    Fault {
        /// The fault's number.
        code: i64,
        /// What it says.
        text: String,
    },
}

impl Value {
    pub(super) fn member(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Members(members) => members.iter().find(|(key, _)| key == name).map(|(_, value)| value),
            _ => None,
        }
    }

    pub(super) fn text(&self) -> Option<&str> {
        match self {
            Self::Text(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn number(&self) -> Option<i64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    fn render(&self, text: &mut String) {
        text.push_str("<value>");
        match self {
            Self::Text(value) => {
                text.push_str("<string>");
                for c in value.chars() {
                    match c {
                        '<' => text.push_str("&lt;"),
                        '>' => text.push_str("&gt;"),
                        '&' => text.push_str("&amp;"),
                        c => text.push(c),
                    }
                }
                text.push_str("</string>");
            }
            Self::Boolean(value) => {
                let _never_fails = write!(text, "<boolean>{}</boolean>", u8::from(*value));
            }
            Self::Number(value) => {
                let _never_fails = write!(text, "<int>{value}</int>");
            }
            // No method takes one.
            Self::List(_) | Self::Members(_) => {}
        }
        text.push_str("</value>");
    }
}

impl Rpc {
    /// Calls a method.
    pub(super) fn call(
        &self,
        method: &str,
        arguments: &[Value],
        timeout: Duration,
    ) -> Result<Value, RpcError> {
        let mut body =
            format!("<?xml version=\"1.0\"?><methodCall><methodName>{method}</methodName><params>");
        for argument in arguments {
            body.push_str("<param>");
            argument.render(&mut body);
            body.push_str("</param>");
        }
        body.push_str("</params></methodCall>");
        let answer = self
            .post(&body, timeout)
            .map_err(|error| RpcError::Transport(format!("{}: {error}", self.socket.display())))?;
        read_answer(&answer)
    }

    fn post(&self, body: &str, timeout: Duration) -> io::Result<String> {
        let mut stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        let mut head = format!(
            "POST /RPC2 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: text/xml\r\nContent-Length: {}\r\n",
            body.len()
        );
        if let Some((name, password)) = &self.user {
            let _never_fails =
                write!(head, "Authorization: Basic {}\r\n", base64(format!("{name}:{password}").as_bytes()));
        }
        stream.write_all(format!("{head}\r\n{body}").as_bytes())?;
        let mut answer = Vec::new();
        stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer);
        let (head, body) = answer
            .split_once("\r\n\r\n")
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its answer is not HTTP"))?;
        let status = head.split_whitespace().nth(1).unwrap_or_default();
        match status {
            "200" => Ok(body.to_owned()),
            "401" => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                "it refuses the name and password of its configuration",
            )),
            other => Err(io::Error::other(format!("it answered with the status {other}"))),
        }
    }
}

fn read_answer(text: &str) -> Result<Value, RpcError> {
    let bad = |why: String| RpcError::Transport(format!("its answer cannot be understood: {why}"));
    let document = roxmltree::Document::parse(text).map_err(|error| bad(error.to_string()))?;
    let answer = document.root_element();
    let find = |name: &str| answer.descendants().find(|node| node.has_tag_name(name));
    let first_value = |node: roxmltree::Node<'_, '_>| {
        node.descendants()
            .find(|node| node.has_tag_name("value"))
            .and_then(read_value)
            .ok_or_else(|| bad("no value".to_owned()))
    };
    if let Some(node) = find("fault") {
        let value = first_value(node)?;
        let code = value.member("faultCode").and_then(Value::number).unwrap_or_default();
        let text = value.member("faultString").and_then(Value::text).unwrap_or_default().to_owned();
        return Err(RpcError::Fault { code, text });
    }
    first_value(find("params").ok_or_else(|| bad("no params".to_owned()))?)
}

fn read_value(node: roxmltree::Node<'_, '_>) -> Option<Value> {
    let Some(typed) = node.children().find(roxmltree::Node::is_element) else {
        return Some(Value::Text(node.text().unwrap_or_default().to_owned()));
    };
    let text = typed.text().unwrap_or_default();
    let child = |node: roxmltree::Node<'_, '_>, name: &str| {
        node.children().find(|child| child.has_tag_name(name)).map(|node| node.id())
    };
    Some(match typed.tag_name().name() {
        "string" => Value::Text(text.to_owned()),
        "int" | "i4" => Value::Number(text.trim().parse().ok()?),
        "boolean" => Value::Boolean(text.trim() == "1"),
        "array" => {
            let values = typed.children().find(|node| node.has_tag_name("data"))?;
            Value::List(
                values
                    .children()
                    .filter(|node| node.has_tag_name("value"))
                    .map(read_value)
                    .collect::<Option<_>>()?,
            )
        }
        "struct" => {
            let members = typed.children().filter(|node| node.has_tag_name("member"));
            Value::Members(
                members
                    .map(|member| {
                        let document = member.document();
                        let name =
                            document.get_node(child(member, "name")?)?.text().unwrap_or_default().to_owned();
                        Some((name, read_value(document.get_node(child(member, "value")?)?)?))
                    })
                    .collect::<Option<_>>()?,
            )
        }
        _ => Value::Text(text.to_owned()),
    })
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let group =
            chunk.iter().fold(0u32, |group, byte| group << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for digit in 0..4 {
            let index = usize::try_from(group >> (18 - 6 * digit) & 63).unwrap_or_default();
            text.push(if digit <= chunk.len() { char::from(DIGITS[index]) } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let info = "<?xml version='1.0'?>\n<methodResponse>\n<params>\n<param>\n<value><struct>\n<member>\n<name>pid</name>\n\
                    <value><int>42</int></value>\n</member>\n<member>\n<name>statename</name>\n<value><string>RUNNING</string></value>\n\
                    </member>\n</struct></value>\n</param>\n</params>\n</methodResponse>\n";
        let value = read_answer(info).unwrap();
        assert_eq!(value.member("pid").and_then(Value::number), Some(42));
        assert_eq!(value.member("statename").and_then(Value::text), Some("RUNNING"));
        let fault = "<methodResponse><fault><value><struct><member><name>faultCode</name><value><int>10</int></value></member>\
                     <member><name>faultString</name><value><string>BAD_NAME: x</string></value></member></struct></value></fault></methodResponse>";
        assert!(matches!(read_answer(fault), Err(RpcError::Fault { code: 10, .. })));
        let list = "<methodResponse><params><param><value><array><data><value><array><data><value><string>a</string></value></data></array>\
                    </value></data></array></value></param></params></methodResponse>";
        assert_eq!(
            read_answer(list).unwrap(),
            Value::List(vec![Value::List(vec![Value::Text("a".to_owned())])])
        );
        for bad in ["", "<a>", "<methodResponse/>", "<methodResponse><params/></methodResponse>"] {
            assert!(matches!(read_answer(bad), Err(RpcError::Transport(_))), "{bad}");
        }
    }

    #[test]
    fn passwords_are_encoded() {
        for (plain, encoded) in
            [("", ""), ("a", "YQ=="), ("ab", "YWI="), ("abc", "YWJj"), ("ada:secret", "YWRhOnNlY3JldA==")]
        {
            assert_eq!(base64(plain.as_bytes()), encoded);
        }
    }
}
