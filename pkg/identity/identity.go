// Package identity is the vocabulary that all parts share: registration entries
// with their compiled rules, trust bundles, X.509-SVIDs with their keys, and the
// immutable snapshots of them that workloads are served from. It answers "who
// may be called what". It does not know how a fact was attested, how an SVID is
// signed, or how either travels.
package identity
