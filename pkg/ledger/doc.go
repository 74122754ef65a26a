// Package ledger is the CA's journal of decisions: it answers "what was issued or
// refused, to whom, when and why", and holds back each certificate until the
// answer is on the disk. It does not know how decisions are made, nor what
// certificates are.
//
// A decision is made a Draft, together with the certificate chain that it
// releases. Journal.Append makes drafts durable and returns a Durable for each,
// and only a Durable gives the chain. The chain hence cannot leave the process
// before its record is safe, unless somebody keeps it beside the draft.
//
// # Directory
//
// A journal is a directory of segments, and a file "lock" that its one writer
// holds with flock(2). Segments are named by the index of their first record, in
// 20 decimal digits, with the suffix ".segment"; a file ".segment.new" is one
// that is being made, and is ignored. A directory is copied with ordinary tools,
// also while it is in use; Scan and Verify read copies. A file "archived" with a
// Head says that segments below it may have been put elsewhere; the journal then
// begins with a later record. All numbers are unsigned and big-endian.
//
// # Segment
//
// A segment is a header of 80 bytes and frames. The header is
//
//	offset  bytes
//	     0     16  "meshid ledger 1\n"
//	    16     16  name of the journal: random, the same in all its segments
//	    32      8  index of the first record
//	    40     32  link before the first record
//	    72      4  zero
//	    76      4  CRC-32C of the 76 bytes before
//
// and each frame, at an offset that is a multiple of 8,
//
//	offset  bytes
//	     0      4  length of the record, 1 to 65,535
//	     4      4  CRC-32C of the journal's name and the frame without these 4 bytes
//	     8      8  index of the record
//	    16      8  base: index of the first record of the same batch
//	    24     32  link of the record
//	    56      …  the record: a meshid.ledger.v1.Record, encoded deterministically
//	     …    0-7  zero, up to a multiple of 8
//
// Indexes count from 0 without gaps. The last segment may go on with zeros: space
// that is reserved. A closed segment ends with its last frame, whose index is one
// below the first of the next segment. A segment gets its name only when its
// header is durable.
//
// # Hashes
//
//	record hash = SHA-256(0x00 || record)
//	link before record 0 = SHA-256("meshid ledger genesis 1\n" || name of the journal)
//	link of record i = SHA-256("meshid ledger link 1\n" || link of record i-1 || i in 8 bytes || record hash)
//
// The record hash is the leaf hash of RFC 6962 §2.1, so a Merkle tree can be
// built over the journal as it is. A link depends on all records before it, their
// order and the journal's name. A number of records with the last link is a Head:
// kept elsewhere, it proves later that none of those records was changed, moved or
// removed, which a journal alone cannot prove against somebody who may write it
// anew or cut off its end.
//
// Records are never encoded again: what is hashed, and what readers hand on, are
// the bytes in the file. An index is a cursor: a reader that has handled all
// records below n goes on with Scan(dir, n) or Follow from n.
//
// # Sinks
//
// Whatever else is made of the records (a Merkle tree, a table to search, lines
// in somebody's collector) is made beside the issuing path from a Tail: durable
// records in their order, as the writer made them for who keeps up, read from the
// disk for who does not. A Feed gives them to a Sink, at least once. A sink that is
// slow or away costs one batch of memory, and is reported; records wait for it in
// the journal.
//
// # Durability
//
// A batch is the records that were written by one write and one fdatasync; it is
// in one segment. A batch is written only after all records before it (those with
// an index below base) are durable. From that follows what may be found after a
// crash: whole batches, and behind them a part of one more, any of whose bytes may
// be missing. Open cuts off what is behind the last sound record, if no sound
// frame behind it has a base above the record that is missing. If there is one,
// the missing record was durable once, so this is no interrupted write but damage:
// as damage anywhere else, it is refused, and nothing is cut. It is then for a
// person to find out what happened and to restore the segment from a copy.
//
// When there is no space, the write is taken back and Append returns ErrFull; the
// next Append tries again. Any other refusal of a write, and each of an fsync, is
// final (ErrFailed): after it, the kernel's memory and the disk may differ, and an
// fsync that is tried again may succeed without having written what the first one
// lost. For the same reason Open writes the last batch once more before it trusts
// it.
package ledger
