package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// faults is the control file by which a test switches what goes wrong, while the driver runs: a fault a line.
// All instances and both drivers of a cluster read the same file; without one nothing goes wrong.
type faults struct{ file string }

// fault is a line: the call, then words.
type fault struct {
	call       string
	claim      string            // a namespace, or namespace/name: only for its volume
	fail       int               // so many calls fail
	code       codes.Code        // with this code
	hang       time.Duration     // before it is carried out; ends when the line goes
	late       time.Duration     // after it was carried out
	parameters map[string]string // as if the snapshot's class had them
	lie        string            // what a list of blocks says wrong
}

// poolFull is not a call: everything that needs room is refused and no capacity is left.
const poolFull = "PoolFull"

// Lies of a list of blocks.
const (
	lieIncomplete = "incomplete" // the last range is left out
	lieEmpty      = "empty"      // nothing has changed
	lieBeyond     = "beyond"     // a range behind the end of the volume
	lieBroken     = "broken"     // the stream breaks after the first reply
)

var (
	snapshotCalls = []string{"CreateSnapshot", "CreateVolumeGroupSnapshot"}
	streamCalls   = []string{"GetMetadataAllocated", "GetMetadataDelta"}
	roomCalls     = []string{"CreateVolume", "CreateSnapshot", "CreateVolumeGroupSnapshot", "ControllerExpandVolume"}
)

func isCall(name string) bool {
	for _, d := range []grpc.ServiceDesc{csi.Identity_ServiceDesc, csi.Controller_ServiceDesc, csi.GroupController_ServiceDesc, csi.Node_ServiceDesc} {
		if slices.ContainsFunc(d.Methods, func(m grpc.MethodDesc) bool { return m.MethodName == name }) {
			return true
		}
	}
	return slices.Contains(streamCalls, name)
}

// parseFault refuses what it does not know, so that a typing error cannot make a test that injects nothing.
func parseFault(line string) (f fault, err error) {
	words := strings.Fields(line)
	if len(words) == 0 || (!isCall(words[0]) && words[0] != poolFull) {
		return f, fmt.Errorf("fault %q: no such call", line)
	}
	f = fault{call: words[0], code: codes.Internal}
	if (f.call == poolFull) != (len(words) == 1) {
		return f, fmt.Errorf("fault %q: %s stands alone, a call has words", line, poolFull)
	}
	for _, word := range words[1:] {
		key, value, _ := strings.Cut(word, "=")
		if err := f.set(key, value); err != nil {
			return f, fmt.Errorf("fault %q: %q: %v", line, word, err) // not %w: a code in it would be taken for the call's
		}
	}
	return f, nil
}

var errWord = errors.New("no such word for this call, or no such value")

func (f *fault) set(key, value string) (err error) {
	switch {
	case key == "claim" && value != "":
		f.claim = value
	case key == "fail":
		if f.fail, err = strconv.Atoi(value); strconv.Itoa(f.fail) != value { // as `fail` counts it down
			err = errWord
		}
	case key == "code":
		err = f.code.UnmarshalJSON([]byte(strconv.Quote(value)))
	case key == "hang":
		f.hang, err = time.ParseDuration(value)
	case key == "late" && !slices.Contains(streamCalls, f.call):
		f.late, err = time.ParseDuration(value)
	case key == "lie" && slices.Contains(streamCalls, f.call) && slices.Contains([]string{lieIncomplete, lieEmpty, lieBeyond, lieBroken}, value):
		f.lie = value
	case slices.Contains(snapshotCalls, f.call):
		if f.parameters == nil {
			f.parameters = map[string]string{}
		}
		f.parameters[key] = value
		_, err = parseCut(f.parameters)
	default:
		err = errWord
	}
	if err == nil && (f.fail < 0 || f.hang < 0 || f.late < 0) {
		err = errWord
	}
	return err
}

// covers says whether the fault is one of this call for a volume of this claim.
func (f *fault) covers(call, claim string) bool {
	return f.call == call && (f.claim == "" || f.claim == claim || strings.HasPrefix(claim, f.claim+"/"))
}

// change rewrites the file under a lock of its own, so that calls of several instances count together.
func (fs faults) change(how func(lines []string) ([]string, error)) error {
	lock, err := os.OpenFile(fs.file+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return err
	}
	lines, err := fs.lines()
	if err == nil {
		lines, err = how(lines)
	}
	if err != nil {
		return err
	}
	if len(lines) == 0 {
		return removeFile(fs.file)
	}
	if err := os.WriteFile(fs.file+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		return err
	}
	return os.Rename(fs.file+".new", fs.file)
}

func (fs faults) lines() ([]string, error) {
	b, err := os.ReadFile(fs.file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return strings.FieldsFunc(string(b), func(r rune) bool { return r == '\n' }), nil
}

// covering gives the faults of a call.
func (fs faults) covering(call, claim string) (all []fault, err error) {
	lines, err := fs.lines()
	for _, line := range lines {
		f, parseErr := parseFault(line)
		if parseErr != nil {
			return nil, parseErr
		}
		if f.covers(call, claim) {
			all = append(all, f)
		}
	}
	return all, err
}

// fail uses up one failure of the call; nil when none is left.
func (fs faults) fail(call, claim string) (failure error) {
	err := fs.change(func(lines []string) ([]string, error) {
		for i, line := range lines {
			f, err := parseFault(line)
			if err != nil {
				return nil, err
			}
			if !f.covers(call, claim) || f.fail == 0 {
				continue
			}
			failure = status.Errorf(f.code, "injected failure of %s, %d left", call, f.fail-1)
			if f.fail == 1 {
				return slices.Delete(lines, i, i+1), nil
			}
			lines[i] = strings.Replace(line, fmt.Sprintf("fail=%d", f.fail), fmt.Sprintf("fail=%d", f.fail-1), 1)
			return lines, nil
		}
		return lines, nil
	})
	if err != nil {
		return internal(err)
	}
	return failure
}

// hang waits until its time is over, no fault asks for it any more, or the caller gives up.
func (fs faults) hang(ctx context.Context, call, claim string) error {
	for begun := time.Now(); ; {
		all, err := fs.covering(call, claim)
		if err != nil {
			return internal(err)
		}
		if !slices.ContainsFunc(all, func(f fault) bool { return f.hang > time.Since(begun) }) {
			return nil
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}

// before is what goes wrong with a call before it is carried out; it gives the faults that concern the call itself.
func (fs faults) before(ctx context.Context, call, claim string) ([]fault, error) {
	all, err := fs.covering(call, claim)
	if err != nil {
		return nil, internal(err)
	}
	if len(all) == 0 {
		return nil, nil
	}
	if err := fs.hang(ctx, call, claim); err != nil {
		return nil, err
	}
	return all, fs.fail(call, claim)
}

// isFull: nothing that needs room is carried out.
func (fs faults) isFull() (bool, error) {
	all, err := fs.covering(poolFull, "")
	return len(all) > 0, err
}

// injectFaults stands before every call but the streams, which ask for themselves.
func (d *driver) injectFaults(ctx context.Context, q any, i *grpc.UnaryServerInfo, h grpc.UnaryHandler) (any, error) {
	call := path.Base(i.FullMethod)
	full, err := d.faults.isFull()
	if err != nil {
		return nil, internal(err)
	}
	if full && slices.Contains(roomCalls, call) {
		return nil, status.Error(codes.ResourceExhausted, "injected: the pool is full")
	}
	if full && call == "GetCapacity" {
		return &csi.GetCapacityResponse{}, nil
	}
	all, err := d.faults.before(ctx, call, d.claimOf(q))
	if err != nil {
		return nil, err
	}
	for _, f := range all {
		setParameters(q, f.parameters)
	}
	r, err := h(ctx, q)
	for _, f := range all {
		if late := pause(ctx, f.late); late != nil {
			return nil, late
		}
	}
	return r, err
}

func setParameters(q any, parameters map[string]string) {
	for k, v := range parameters {
		switch q := q.(type) {
		case *csi.CreateSnapshotRequest:
			if q.Parameters == nil {
				q.Parameters = map[string]string{}
			}
			q.Parameters[k] = v
		case *csi.CreateVolumeGroupSnapshotRequest:
			if q.Parameters == nil {
				q.Parameters = map[string]string{}
			}
			q.Parameters[k] = v
		}
	}
}

// claimIn reads what the provisioner adds to the parameters of a StorageClass.
func claimIn(parameters map[string]string) string {
	name := parameters[sidecarPrefix+"pvc/name"]
	if name == "" {
		return ""
	}
	return parameters[sidecarPrefix+"pvc/namespace"] + "/" + name
}

// claimOf is the claim of the volume that a call is about; empty when it is about none that is known.
func (d *driver) claimOf(q any) string {
	volumes := []string{}
	switch q := q.(type) {
	case *csi.CreateVolumeRequest:
		return claimIn(q.Parameters)
	case *csi.CreateVolumeGroupSnapshotRequest:
		volumes = q.SourceVolumeIds
	case interface{ GetSourceVolumeId() string }:
		volumes = append(volumes, q.GetSourceVolumeId())
	case interface{ GetVolumeId() string }:
		volumes = append(volumes, q.GetVolumeId())
	case interface{ GetSnapshotId() string }:
		if s, err := load[snapshot](d.records, q.GetSnapshotId()); err == nil {
			return s.Claim
		}
	}
	for _, id := range volumes {
		if v, err := load[volume](d.records, id); err == nil {
			return v.Claim
		}
	}
	return ""
}

// controlFaults is the program's second use: `fault FILE list|clear [WORD]|CALL WORD...`.
func controlFaults(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: lifeboat-test-csi fault FILE list|clear [WORD]|CALL WORD...")
	}
	fs := faults{args[0]}
	return fs.change(func(lines []string) ([]string, error) {
		switch args[1] {
		case "clear":
			if len(args) == 2 {
				return nil, nil
			}
			return slices.DeleteFunc(lines, func(line string) bool {
				return slices.Contains(strings.Fields(line), args[2])
			}), nil
		case "list":
			for _, line := range lines {
				fmt.Println(line)
			}
			return lines, nil
		}
		line := strings.Join(args[1:], " ")
		if _, err := parseFault(line); err != nil {
			return nil, err
		}
		return append(lines, line), nil
	})
}
