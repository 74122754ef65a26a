package server

import (
	"context"

	ledgerv1 "github.com/meshid/meshid/proto/ledger/v1"
)

// RecordSignIn records that somebody signs in to the console. It may not have any
// effect unless that succeeds.
func (s *Server) RecordSignIn(ctx context.Context, who string, in *ledgerv1.SignIn) error {
	return s.append(ctx, s.signInRecord(who, in))
}

// RecordRefusedSignIn records that somebody was not let in to the console, or counts
// it, as other refusals are: nobody fills the ledger by being refused.
func (s *Server) RecordRefusedSignIn(ctx context.Context, who string, in *ledgerv1.SignIn, reason, detail string) {
	r := s.signInRecord(who, in)
	r.Outcome, r.Reason, r.Detail = ledgerv1.Outcome_OUTCOME_REFUSED, reason, truncate(detail)
	s.recordRefusal(ctx, host(in.GetAddress()), true, r)
}

func (s *Server) signInRecord(who string, in *ledgerv1.SignIn) *ledgerv1.Record {
	r := s.ownRecord(ledgerv1.Event_EVENT_SIGN_IN)
	r.Actor, r.SignIn, r.RequestId = truncate(who), in, newRequestID()
	return r
}
