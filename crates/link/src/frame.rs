//! Frames: what the bytes between controller and agent are made of.
//!
//! A frame is a length of four bytes (big-endian, of what follows it), one byte for its kind, and a payload:
//!
//! | kind | payload |
//! | --- | --- |
//! | 1 message | a [`Message`] as JSON, at most [`MESSAGE_BYTES_MAX`] |
//! | 2 data | the request's number (u64), the parcel's hash (32 bytes), the encoding (0 raw, 1 zstd, 2 delta, 3 pack, 4 manifest), whether more of the parcel follows (0 or 1), at most [`DATA_BYTES_MAX`] of it |
//! | 3 end of data | the request's number (u64) |
//! | 4 packed message | a [`Message`] as JSON, at most [`MESSAGE_BYTES_MAX`] of it, in one zstd frame: how large ones are written |
//!
//! Guarantees: a reader allocates as bytes arrive, never by the announced length alone; whatever the bytes are, the answer is a
//! frame or a typed error, never a panic. After an error the stream cannot be used any more.
//! Not in here: whether the data has the hash it is said to have, and what its encoding unpacks to; the receiver checks both.

use std::io::{self, Read, Write};

use greenlight_model::id::ContentHash;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::message::{DATA_BYTES_MAX, MESSAGE_BYTES_MAX, Message};

/// One unit on the wire.
#[derive(Debug, Clone, PartialEq)]
pub enum Frame {
    /// A message.
    Message(Message),
    /// A piece of a parcel that belongs to a request. The pieces of one parcel come one after the other, with nothing of
    /// another of the same request between them.
    Data {
        /// The request's number.
        id: u64,
        /// The hash of the object before encoding, or what else names the parcel.
        hash: ContentHash,
        /// How the parcel is packed.
        encoding: Encoding,
        /// Whether it goes on with the next one.
        has_more: bool,
        /// The packed bytes, at most [`DATA_BYTES_MAX`].
        data: Vec<u8>,
    },
    /// No more objects for a request.
    EndOfData {
        /// The request's number.
        id: u64,
    },
}

/// How an object's bytes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// As they are.
    Raw,
    /// One zstd frame.
    Zstd,
    /// The hash of another object (32 bytes), then a zstd frame that refers to that one's bytes.
    Delta,
    /// Many objects in one run; the hash is that of all these bytes.
    Pack,
    /// No object, but what the release consists of, as a zstd frame; the hash is the release's id.
    Manifest,
}

impl Encoding {
    const ALL: [Self; 5] = [Self::Raw, Self::Zstd, Self::Delta, Self::Pack, Self::Manifest];
}

/// Why bytes are not a frame, or a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Reading failed.
    #[error("reading a frame failed: {0}")]
    Read(#[source] io::Error),
    /// Writing failed.
    #[error("writing a frame failed: {0}")]
    Write(#[source] io::Error),
    /// The stream ended inside a frame.
    #[error("the stream ended inside a frame")]
    Truncated,
    /// The first bytes of the frame are no frame's beginning.
    #[error("a frame of unknown kind {kind}: the other side does not speak this protocol")]
    UnknownKind {
        /// The kind's byte.
        kind: u8,
    },
    /// The frame is shorter than its kind can be.
    #[error("a frame of {bytes} bytes is too short for its kind {kind}")]
    TooShort {
        /// The kind's byte.
        kind: u8,
        /// Its announced length.
        bytes: usize,
    },
    /// The frame is longer than its kind may be.
    #[error("a frame of {bytes} bytes is longer than the {bytes_max} that its kind {kind} may have")]
    TooLong {
        /// The kind's byte.
        kind: u8,
        /// Its length.
        bytes: usize,
        /// The limit.
        bytes_max: usize,
    },
    /// The data's encoding is not known.
    #[error("data in unknown encoding {0}")]
    UnknownEncoding(u8),
    /// Whether more of the data follows is not known.
    #[error("data with an unknown mark {0}")]
    UnknownMark(u8),
    /// The message is not one of ours.
    #[error("a message could not be understood: {0}")]
    BadMessage(#[source] serde_json::Error),
    /// The message could not be packed or unpacked.
    #[error("a packed message could not be read or made: {0}")]
    Packing(#[source] io::Error),
}

/// Reads one frame; `None` when the stream ends before its first byte.
///
/// # Errors
/// When reading fails, the stream ends inside the frame, or the bytes are no frame.
pub fn read_frame(reader: &mut impl Read) -> Result<Option<Frame>, FrameError> {
    let mut start = [0u8; START_BYTES];
    // The first byte apart: ending before it is a proper end, ending after it is not.
    loop {
        match reader.read(&mut start[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(FrameError::Read(error)),
        }
    }
    reader.read_exact(&mut start[1..]).map_err(read_error)?;
    let plan = Plan::of(start)?;
    let mut fixed = [0u8; DATA_FIXED_BYTES];
    reader.read_exact(&mut fixed[..plan.kind.fixed_bytes()]).map_err(read_error)?;
    let mut rest = Vec::with_capacity(plan.rest_bytes.min(FIRST_ALLOCATION_BYTES));
    reader.take(plan.rest_bytes as u64).read_to_end(&mut rest).map_err(read_error)?;
    plan.finish(fixed, rest).map(Some)
}

/// Writes one frame. It does not flush: a caller that buffers flushes when it has nothing more to write.
///
/// # Errors
/// When writing fails or the frame is longer than allowed.
pub fn write_frame(writer: &mut impl Write, frame: &Frame) -> Result<(), FrameError> {
    let (head, data) = encode(frame)?;
    writer.write_all(&head).map_err(FrameError::Write)?;
    writer.write_all(data).map_err(FrameError::Write)
}

/// As [`read_frame`], for tokio. Not safe to cancel: a reader that is dropped half-way has lost its place.
///
/// # Errors
/// As [`read_frame`].
pub async fn read_frame_async(reader: &mut (impl AsyncRead + Unpin)) -> Result<Option<Frame>, FrameError> {
    let mut start = [0u8; START_BYTES];
    if reader.read(&mut start[..1]).await.map_err(FrameError::Read)? == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut start[1..]).await.map_err(read_error)?;
    let plan = Plan::of(start)?;
    let mut fixed = [0u8; DATA_FIXED_BYTES];
    reader.read_exact(&mut fixed[..plan.kind.fixed_bytes()]).await.map_err(read_error)?;
    let mut rest = Vec::with_capacity(plan.rest_bytes.min(FIRST_ALLOCATION_BYTES));
    reader.take(plan.rest_bytes as u64).read_to_end(&mut rest).await.map_err(read_error)?;
    plan.finish(fixed, rest).map(Some)
}

/// As [`write_frame`], for tokio. Not safe to cancel: a frame that was written half-way ruins the stream.
///
/// # Errors
/// As [`write_frame`].
pub async fn write_frame_async(
    writer: &mut (impl AsyncWrite + Unpin),
    frame: &Frame,
) -> Result<(), FrameError> {
    let (head, data) = encode(frame)?;
    writer.write_all(&head).await.map_err(FrameError::Write)?;
    writer.write_all(data).await.map_err(FrameError::Write)
}

/// Length and kind.
const START_BYTES: usize = 5;
/// Number, hash, encoding and whether more follows, before the data.
const DATA_FIXED_BYTES: usize = 8 + 32 + 1 + 1;
/// What is set aside before the first byte of a payload is there: enough for most messages, too little to hurt.
const FIRST_ALLOCATION_BYTES: usize = 64 * 1024;
/// Messages of more bytes than this are packed: manifests, above all, of which four in five bytes need not travel.
const PACKED_BYTES_MIN: usize = 16 * 1024;
/// zstd's own default.
const PACKING_LEVEL: i32 = 3;
/// Most bytes of JSON that a packed byte may become: manifests have four. What would have more is not packed, so that nobody
/// makes us hold much by sending little.
const UNPACKED_PER_BYTE_MAX: usize = 32;
/// The window of a packed message, as a power of two: 4 MiB, twice what is written at our level.
const PACKED_WINDOW_LOG_MAX: u32 = 22;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Message = 1,
    Data = 2,
    EndOfData = 3,
    PackedMessage = 4,
}

impl Kind {
    /// Bytes that every frame of the kind has after its start.
    fn fixed_bytes(self) -> usize {
        match self {
            Self::Message | Self::PackedMessage => 0,
            Self::Data => DATA_FIXED_BYTES,
            Self::EndOfData => 8,
        }
    }

    /// Most bytes after the fixed ones.
    fn rest_bytes_max(self) -> usize {
        match self {
            Self::Message | Self::PackedMessage => MESSAGE_BYTES_MAX,
            Self::Data => DATA_BYTES_MAX,
            Self::EndOfData => 0,
        }
    }

    /// The frame's beginning for so many bytes after the fixed ones.
    fn start(self, rest_bytes: usize) -> Result<[u8; START_BYTES], FrameError> {
        let too_long =
            || FrameError::TooLong { kind: self as u8, bytes: rest_bytes, bytes_max: self.rest_bytes_max() };
        if rest_bytes > self.rest_bytes_max() {
            return Err(too_long());
        }
        let length = u32::try_from(1 + self.fixed_bytes() + rest_bytes).map_err(|_| too_long())?;
        let [a, b, c, d] = length.to_be_bytes();
        Ok([a, b, c, d, self as u8])
    }
}

/// What the first five bytes say of the rest.
struct Plan {
    kind: Kind,
    rest_bytes: usize,
}

impl Plan {
    fn of([a, b, c, d, kind]: [u8; START_BYTES]) -> Result<Self, FrameError> {
        let bytes = u32::from_be_bytes([a, b, c, d]) as usize;
        let kind = match kind {
            1 => Kind::Message,
            2 => Kind::Data,
            3 => Kind::EndOfData,
            4 => Kind::PackedMessage,
            kind => return Err(FrameError::UnknownKind { kind }),
        };
        let rest_bytes = bytes
            .checked_sub(1 + kind.fixed_bytes())
            .ok_or(FrameError::TooShort { kind: kind as u8, bytes })?;
        if rest_bytes > kind.rest_bytes_max() {
            let bytes_max = kind.rest_bytes_max();
            return Err(FrameError::TooLong { kind: kind as u8, bytes: rest_bytes, bytes_max });
        }
        Ok(Self { kind, rest_bytes })
    }

    fn finish(&self, fixed: [u8; DATA_FIXED_BYTES], rest: Vec<u8>) -> Result<Frame, FrameError> {
        if rest.len() < self.rest_bytes {
            return Err(FrameError::Truncated);
        }
        let mut id = [0u8; 8];
        id.copy_from_slice(&fixed[..8]);
        let id = u64::from_be_bytes(id);
        match self.kind {
            Kind::Message => {
                serde_json::from_slice(&rest).map(Frame::Message).map_err(FrameError::BadMessage)
            }
            Kind::PackedMessage => unpack(&rest).map(Frame::Message),
            Kind::EndOfData => Ok(Frame::EndOfData { id }),
            Kind::Data => {
                let mut hash = [0u8; 32];
                hash.copy_from_slice(&fixed[8..40]);
                let encoding = Encoding::ALL.get(usize::from(fixed[40])).copied();
                let encoding = encoding.ok_or(FrameError::UnknownEncoding(fixed[40]))?;
                let has_more = match fixed[41] {
                    0 => false,
                    1 => true,
                    unknown => return Err(FrameError::UnknownMark(unknown)),
                };
                Ok(Frame::Data { id, hash: ContentHash::from_bytes(hash), encoding, has_more, data: rest })
            }
        }
    }
}

/// The frame as bytes, in two parts so that an object's data is not copied.
fn encode(frame: &Frame) -> Result<(Vec<u8>, &[u8]), FrameError> {
    match frame {
        Frame::Message(message) => {
            let mut head = vec![0; START_BYTES];
            serde_json::to_writer(&mut head, message).map_err(FrameError::BadMessage)?;
            // What is longer than allowed is refused as what it is, packed or not.
            let mut start = Kind::Message.start(head.len() - START_BYTES)?;
            if head.len() > PACKED_BYTES_MIN {
                let packed = zstd::bulk::compress(&head[START_BYTES..], PACKING_LEVEL);
                let packed = packed.map_err(FrameError::Packing)?;
                if head.len() - START_BYTES <= packed.len() * UNPACKED_PER_BYTE_MAX {
                    start = Kind::PackedMessage.start(packed.len())?;
                    head.truncate(START_BYTES);
                    head.extend_from_slice(&packed);
                }
            }
            head[..START_BYTES].copy_from_slice(&start);
            Ok((head, &[]))
        }
        Frame::Data { id, hash, encoding, has_more, data } => {
            let mut head = Vec::with_capacity(START_BYTES + DATA_FIXED_BYTES);
            head.extend_from_slice(&Kind::Data.start(data.len())?);
            head.extend_from_slice(&id.to_be_bytes());
            head.extend_from_slice(hash.as_bytes());
            head.extend_from_slice(&[*encoding as u8, u8::from(*has_more)]);
            Ok((head, data))
        }
        Frame::EndOfData { id } => {
            let mut head = Vec::with_capacity(START_BYTES + 8);
            head.extend_from_slice(&Kind::EndOfData.start(0)?);
            head.extend_from_slice(&id.to_be_bytes());
            Ok((head, &[]))
        }
    }
}

/// A packed message; never more than [`MESSAGE_BYTES_MAX`], nor more than [`UNPACKED_PER_BYTE_MAX`] for each byte, are made of
/// whatever arrives.
fn unpack(packed: &[u8]) -> Result<Message, FrameError> {
    let bytes_max = packed.len().saturating_mul(UNPACKED_PER_BYTE_MAX).min(MESSAGE_BYTES_MAX);
    let mut decoder = zstd::stream::read::Decoder::with_buffer(packed).map_err(FrameError::Packing)?;
    decoder.window_log_max(PACKED_WINDOW_LOG_MAX).map_err(FrameError::Packing)?;
    let mut json = Vec::new();
    decoder.take(bytes_max as u64 + 1).read_to_end(&mut json).map_err(FrameError::Packing)?;
    if json.len() > bytes_max {
        return Err(FrameError::TooLong { kind: Kind::PackedMessage as u8, bytes: json.len(), bytes_max });
    }
    serde_json::from_slice(&json).map_err(FrameError::BadMessage)
}

fn read_error(error: io::Error) -> FrameError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => FrameError::Truncated,
        _ => FrameError::Read(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Event, Reply, Stream};
    use proptest::prelude::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().unwrap()
    }

    /// Reads with both readers, which must agree, and says what came out.
    fn read(bytes: &[u8]) -> Result<Option<Frame>, String> {
        let blocking = read_frame(&mut &bytes[..]).map_err(|error| error.to_string());
        let tokio = runtime().block_on(read_frame_async(&mut &bytes[..])).map_err(|error| error.to_string());
        assert_eq!(blocking, tokio);
        blocking
    }

    fn written(frame: &Frame) -> Vec<u8> {
        let (mut blocking, mut tokio) = (Vec::new(), Vec::new());
        write_frame(&mut blocking, frame).unwrap();
        runtime().block_on(write_frame_async(&mut tokio, frame)).unwrap();
        assert_eq!(blocking, tokio);
        blocking
    }

    fn data(bytes: usize) -> Frame {
        let hash = ContentHash::from_bytes([7; 32]);
        Frame::Data {
            id: u64::MAX - 1,
            hash,
            encoding: Encoding::Zstd,
            has_more: bytes > 1,
            data: vec![9; bytes],
        }
    }

    #[test]
    fn frames_come_out_as_they_went_in() {
        let line = Event::Line { process: None, stream: Stream::Stderr, text: "ünïcode\n\0".to_owned() };
        let frames = [
            Frame::Message(Message::Reply { id: 3, result: Ok(Reply::Done) }),
            Frame::Message(Message::Event { id: 4, event: line }),
            data(0),
            data(1),
            data(DATA_BYTES_MAX),
            Frame::EndOfData { id: 5 },
        ];
        let stream: Vec<u8> = frames.iter().flat_map(written).collect();
        let mut reader = &stream[..];
        for frame in frames {
            assert!(read_frame(&mut reader).unwrap() == Some(frame));
        }
        assert_eq!(read_frame(&mut reader).unwrap(), None);
    }

    #[test]
    fn hostile_bytes_are_refused_with_the_reason() {
        let json = |text: &str| {
            let mut bytes = u32::try_from(text.len() + 1).unwrap().to_be_bytes().to_vec();
            bytes.push(1);
            bytes.extend_from_slice(text.as_bytes());
            bytes
        };
        let mut bad_encoding = written(&data(0));
        bad_encoding[45] = 5;
        let mut bad_mark = written(&data(0));
        bad_mark[46] = 2;
        let mut deep = "[".repeat(100_000);
        deep.push('1');
        let cases: Vec<(&str, Vec<u8>, &str)> = vec![
            ("one byte", vec![0], "ended inside"),
            ("length only", vec![0, 0, 0, 1], "ended inside"),
            ("an ssh banner", b"Welcome to host\n".to_vec(), "unknown kind 111"),
            ("kind 0", vec![0, 0, 0, 1, 0], "unknown kind 0"),
            ("kind 5", vec![0, 0, 0, 1, 5], "unknown kind 5"),
            ("an empty packed message", vec![0, 0, 0, 1, 4], "packed message"),
            ("a packed message that is none", vec![0, 0, 0, 3, 4, b'{', b'}'], "packed message"),
            ("no length", vec![0, 0, 0, 0, 1], "too short"),
            ("longest length, message", vec![255, 255, 255, 255, 1], "longer than"),
            ("longest length, data", vec![255, 255, 255, 255, 2], "longer than"),
            ("data one byte too long", vec![0, 0x10, 0, 44, 2], "longer than"),
            ("an unknown mark", bad_mark, "unknown mark 2"),
            ("data without its hash", vec![0, 0, 0, 41, 2], "too short"),
            ("end with something after it", vec![0, 0, 0, 10, 3], "longer than"),
            ("end without its number", vec![0, 0, 0, 8, 3], "too short"),
            ("largest message that never comes", vec![0x20, 0, 0, 1, 1, b'{'], "ended inside"),
            ("data that ends early", written(&data(100))[..100].to_vec(), "ended inside"),
            ("unknown encoding", bad_encoding, "unknown encoding 5"),
            ("an empty message", json(""), "understood"),
            ("not JSON", json("hello"), "understood"),
            ("another message", json(r#"{"greeting":{"protocol":1}}"#), "understood"),
            ("unknown message", json(r#"{"shutdown":{}}"#), "understood"),
            ("too deep", json(&deep), "understood"),
            ("not UTF-8", vec![0, 0, 0, 3, 1, 0xff, 0xfe], "understood"),
        ];
        for (name, bytes, expected) in cases {
            let error = read(&bytes).expect_err(name);
            assert!(error.contains(expected), "{name}: {error}");
        }
    }

    #[test]
    fn large_messages_travel_packed() {
        let bases = (0..256u32).map(|n| (n, ContentHash::from_bytes([n.to_be_bytes()[3]; 32]))).collect();
        let event = Event::Missing { objects: Vec::new(), bases };
        let frame = Frame::Message(Message::Event { id: 4, event });
        let bytes = written(&frame);
        assert_eq!(bytes[4], 4);
        assert!(bytes.len() < 64 * 256 / 2, "{} bytes", bytes.len());
        assert_eq!(read(&bytes), Ok(Some(frame)));
        // One that ends early.
        let error =
            read(&[&bytes[..3], &[bytes[3] - 1, 4], &bytes[5..bytes.len() - 1]].concat()).unwrap_err();
        assert!(error.contains("packed message"), "{error}");

        // What would become very much more is written as it is, and refused from whoever packs it all the same.
        let text = "a".repeat(1 << 20);
        let line = Event::Line { process: None, stream: Stream::Stdout, text };
        let plain = written(&Frame::Message(Message::Event { id: 1, event: line }));
        assert_eq!(plain[4], 1);
        let packed = zstd::bulk::compress(&plain[START_BYTES..], PACKING_LEVEL).unwrap();
        let bomb = [&Kind::PackedMessage.start(packed.len()).unwrap()[..], &packed].concat();
        let error = read(&bomb).unwrap_err();
        assert!(error.contains("longer than"), "{error}");
    }

    #[test]
    fn nothing_longer_than_allowed_is_written() {
        let mut sink = Vec::new();
        let error = write_frame(&mut sink, &data(DATA_BYTES_MAX + 1)).unwrap_err();
        assert!(matches!(error, FrameError::TooLong { kind: 2, .. }), "{error}");
        assert!(sink.is_empty());
    }

    #[test]
    fn memory_follows_the_bytes_that_arrive() {
        /// Gives what it has and then notes how large a buffer it was asked to fill.
        struct Noting<'a>(&'a [u8], usize);
        impl Read for Noting<'_> {
            fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
                self.1 = self.1.max(buffer.len());
                Read::read(&mut self.0, buffer)
            }
        }
        let mut reader = Noting(&[0x20, 0, 0, 1, 1, b'{'], 0);
        assert!(matches!(read_frame(&mut reader), Err(FrameError::Truncated)));
        assert!(reader.1 <= 2 * FIRST_ALLOCATION_BYTES, "{} bytes were set aside", reader.1);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes);
        }

        #[test]
        fn damaged_frames_never_panic(kind in 0u8..6, length in 0u32..300, rest in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut bytes = length.to_be_bytes().to_vec();
            bytes.push(kind);
            bytes.extend_from_slice(&rest);
            let _ = read(&bytes);
        }
    }
}
