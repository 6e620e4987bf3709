//! Patterns that choose paths: what a backup leaves out, what a restore takes.
//!
//! `?` is one byte, `*` any bytes of one name, `**` any bytes with slashes, `[a-z]` and `[!a-z]` one byte of a set,
//! `\` takes the next byte as it is. Matching takes time in proportion to pattern × path, whatever the pattern.

/// A parsed pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Glob {
    tokens: Vec<Token>,
    /// The components before the first special byte.
    literal: Vec<u8>,
    /// Whether there is no special byte at all.
    is_literal: bool,
    /// Whether it is compared with whole paths; else with the last component.
    anchored: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Token {
    Byte(u8),
    AnyByte,
    AnyName,
    AnyPath,
    Set { ranges: Vec<(u8, u8)>, negated: bool },
}

impl Token {
    fn takes(&self, byte: u8) -> bool {
        match self {
            Self::Byte(own) => *own == byte,
            Self::AnyByte | Self::AnyName => byte != b'/',
            Self::AnyPath => true,
            Self::Set { ranges, negated } => {
                byte != b'/' && ranges.iter().any(|(low, high)| (*low..=*high).contains(&byte)) != *negated
            }
        }
    }

    fn repeats(&self) -> bool {
        matches!(self, Self::AnyName | Self::AnyPath)
    }
}

impl Glob {
    /// A pattern for excluding: without a slash it means a name at any depth, else a path from the root.
    pub(crate) fn exclude(pattern: &str) -> Self {
        let anchored = pattern.trim_end_matches('/').contains('/');
        Self::parse(pattern.trim_matches('/').as_bytes(), anchored)
    }

    /// A pattern for selecting: always a path from the root.
    pub(crate) fn select(pattern: &str) -> Self {
        let pattern = pattern.trim_matches('/');
        Self::parse(pattern.strip_prefix("./").unwrap_or(pattern).as_bytes(), true)
    }

    fn parse(pattern: &[u8], anchored: bool) -> Self {
        let mut tokens = Vec::new();
        let mut is_literal = true;
        let mut at = 0;
        while let Some(byte) = pattern.get(at) {
            at += 1;
            let token = match byte {
                b'\\' if at < pattern.len() => {
                    at += 1;
                    Token::Byte(pattern[at - 1])
                }
                b'?' => Token::AnyByte,
                b'*' if pattern.get(at) == Some(&b'*') => {
                    at += 1;
                    // `**/` also stands for no directory at all.
                    if pattern.get(at) == Some(&b'/') && matches!(tokens.last(), None | Some(Token::Byte(b'/'))) {
                        at += 1;
                    }
                    Token::AnyPath
                }
                b'*' => Token::AnyName,
                b'[' => match parse_set(&pattern[at..]) {
                    Some((set, length)) => {
                        at += length;
                        set
                    }
                    None => Token::Byte(b'['),
                },
                other => Token::Byte(*other),
            };
            is_literal &= matches!(token, Token::Byte(_));
            tokens.push(token);
        }
        let mut literal: Vec<u8> =
            tokens.iter().map_while(|token| if let Token::Byte(byte) = token { Some(*byte) } else { None }).collect();
        if !is_literal {
            literal.truncate(literal.iter().rposition(|byte| *byte == b'/').unwrap_or(0));
        }
        Self { tokens, literal, is_literal, anchored }
    }

    /// Whether the pattern means exactly this path.
    pub(crate) fn matches(&self, path: &[u8]) -> bool {
        let text = if self.anchored { path } else { path.rsplit(|byte| *byte == b'/').next().unwrap_or(path) };
        if self.is_literal {
            return text == self.literal;
        }
        // The set of tokens that may come next, as of a nondeterministic automaton.
        let count = self.tokens.len();
        let mut now = vec![false; count + 1];
        now[0] = true;
        let close = |states: &mut Vec<bool>| {
            for state in 0..count {
                if states[state] && self.tokens[state].repeats() {
                    states[state + 1] = true;
                }
            }
        };
        close(&mut now);
        for byte in text {
            let mut next = vec![false; count + 1];
            for (state, token) in self.tokens.iter().enumerate() {
                if now[state] && token.takes(*byte) {
                    next[if token.repeats() { state } else { state + 1 }] = true;
                }
            }
            close(&mut next);
            now = next;
        }
        now[count]
    }

    /// Whether the pattern means this path or a directory above it.
    pub(crate) fn covers(&self, path: &[u8]) -> bool {
        self.tokens.is_empty()
            || self.matches(path)
            || path.iter().enumerate().any(|(at, byte)| *byte == b'/' && self.matches(&path[..at]))
    }

    /// All that the pattern can mean lies in or below this path.
    pub(crate) fn literal_prefix(&self) -> &[u8] {
        &self.literal
    }
}

fn parse_set(rest: &[u8]) -> Option<(Token, usize)> {
    let negated = matches!(rest.first(), Some(b'!' | b'^'));
    let start = usize::from(negated);
    // A bracket at the first place is a member.
    let end = start + 1 + rest.get(start + 1..)?.iter().position(|byte| *byte == b']')?;
    let mut ranges = Vec::new();
    let mut members = &rest[start..end];
    while let Some((low, tail)) = members.split_first() {
        if let [b'-', high, tail @ ..] = tail {
            ranges.push((*low, *high));
            members = tail;
        } else {
            ranges.push((*low, *low));
            members = tail;
        }
    }
    Some((Token::Set { ranges, negated }, end + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excludes() {
        for (pattern, path, expected) in [
            ("*.tmp", "a/b/c.tmp", true),
            ("*.tmp", "c.tmp", true),
            ("*.tmp", "c.tmp/x", false),
            ("lost+found", "lost+found", true),
            ("lost+found", "x/lost+found", true),
            ("/lost+found", "x/lost+found", false),
            ("/cache", "cache", true),
            ("cache/", "a/cache", true),
            ("a/*/c", "a/b/c", true),
            ("a/*/c", "a/b/b/c", false),
            ("a/**/c", "a/b/b/c", true),
            ("a/**/c", "a/c", true),
            ("**/c", "c", true),
            ("a/**", "a/b/c", true),
            ("[a-c]?", "bz", true),
            ("[!a-c]?", "bz", false),
            ("[!a-c]?", "zz", true),
            ("[]]", "]", true),
            ("\\*", "*", true),
            ("\\*", "x", false),
            ("[x", "[x", true),
        ] {
            assert_eq!(Glob::exclude(pattern).matches(path.as_bytes()), expected, "{pattern} {path}");
        }
    }

    #[test]
    fn selections_cover_what_lies_below() {
        for (pattern, path, expected) in [
            ("a/b", "a/b/c/d", true),
            ("/a/b/", "a/b", true),
            ("a/b", "a/bc", false),
            ("a/b", "a", false),
            ("*.d", "etc.d/x", true),
            ("*.d", "x/etc.d", false),
            ("", "anything", true),
            ("/", "anything", true),
            (".", "anything", false),
        ] {
            assert_eq!(Glob::select(pattern).covers(path.as_bytes()), expected, "{pattern} {path}");
        }
        assert_eq!(Glob::select("a/b/c*/d").literal_prefix(), b"a/b");
        assert_eq!(Glob::select("a/b/c").literal_prefix(), b"a/b/c");
        assert_eq!(Glob::select("*").literal_prefix(), b"");
    }

    #[test]
    fn many_stars_do_not_take_for_ever() {
        let glob = Glob::select(&"*a".repeat(60));
        assert!(!glob.matches(&b"a".repeat(2000).into_iter().chain([b'b']).collect::<Vec<_>>()));
    }
}
