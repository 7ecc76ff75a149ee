-- The whole database. chat_app.py runs this file once, on an empty database, in one transaction.
-- Ids are never used twice (AUTOINCREMENT): a link to a deleted chat can't open somebody else's.
-- Timestamps are text as on the wire (PROTOCOL.md): they sort as they read.

CREATE TABLE chats (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    user_id    TEXT NOT NULL,
    title      TEXT NOT NULL DEFAULT '',
    created_at TEXT NOT NULL,
    updated_at TEXT NOT NULL
) STRICT;

-- A user's chats, newest activity first.
CREATE INDEX chats_by_activity ON chats (user_id, updated_at, id);

-- A message and its reply are inserted together, the reply right after it: ids are in conversation order.
CREATE TABLE messages (
    id                INTEGER PRIMARY KEY AUTOINCREMENT,
    chat_id           INTEGER NOT NULL REFERENCES chats (id) ON DELETE CASCADE,
    user_id           TEXT NOT NULL,  -- the chat's owner: tasks and searches are theirs alone
    content           TEXT NOT NULL,
    is_ai             INTEGER NOT NULL CHECK (is_ai IN (0, 1)),
    timestamp         TEXT NOT NULL,
    status            TEXT NOT NULL
                      CHECK (status IN ('complete', 'streaming', 'aborted', 'failed', 'interrupted')),
    task_id           TEXT NOT NULL CHECK (length(task_id) = 36),
    reply_to          INTEGER REFERENCES messages (id) ON DELETE CASCADE,
    finish_reason     TEXT,
    client_msg_id     TEXT,
    model             TEXT,
    prompt_tokens     INTEGER,
    completion_tokens INTEGER,
    CHECK (is_ai = (reply_to IS NOT NULL)),
    CHECK (is_ai OR status = 'complete'),
    CHECK (client_msg_id IS NULL OR NOT is_ai)
) STRICT;

CREATE INDEX messages_by_chat ON messages (chat_id, id);
CREATE UNIQUE INDEX replies_by_task ON messages (task_id) WHERE is_ai;
CREATE INDEX replies_by_message ON messages (reply_to) WHERE reply_to IS NOT NULL;
-- What runs or waits: a few rows at any time. Admission counts them, recovery ends them.
CREATE INDEX streaming ON messages (status, chat_id) WHERE status = 'streaming';

-- Promise 9: what was sent under a client_msg_id. It outlives the message, so that a retry
-- after the chat was deleted is not billed a second time.
CREATE TABLE sends (
    user_id       TEXT NOT NULL,
    client_msg_id TEXT NOT NULL,
    message_id    INTEGER NOT NULL,
    PRIMARY KEY (user_id, client_msg_id)
) STRICT, WITHOUT ROWID;

-- Full-text search. The index holds no text of its own; the owner is one token, so that a
-- search never walks through other users' hits. Only finished text is in it.
CREATE VIEW searchable AS
    SELECT id, content, 'u' || hex(user_id) AS owner FROM messages;

CREATE VIRTUAL TABLE search USING fts5 (
    content, owner, content = 'searchable', content_rowid = 'id',
    tokenize = 'unicode61 remove_diacritics 2'
);

CREATE TRIGGER message_sent AFTER INSERT ON messages WHEN new.status <> 'streaming' BEGIN
    INSERT INTO search (rowid, content, owner)
    VALUES (new.id, new.content, 'u' || hex(new.user_id));
END;

CREATE TRIGGER reply_settled AFTER UPDATE OF status ON messages
WHEN old.status = 'streaming' AND new.status <> 'streaming' BEGIN
    INSERT INTO search (rowid, content, owner)
    VALUES (new.id, new.content, 'u' || hex(new.user_id));
END;

CREATE TRIGGER message_deleted AFTER DELETE ON messages WHEN old.status <> 'streaming' BEGIN
    INSERT INTO search (search, rowid, content, owner)
    VALUES ('delete', old.id, old.content, 'u' || hex(old.user_id));
END;

PRAGMA user_version = 1;
